# SPDX-License-Identifier: Apache-2.0
"""A base and a delta become an ordinary checkpoint again."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from dqrelo_tools.card import CARD, REPORT
from dqrelo_tools.differences import files_of
from dqrelo_tools.verify import open_for_base
from vllm_dqrelo.format.checkpoint import (
    HEAD,
    MODEL,
    Checkpoint,
    resolve,
)
from vllm_dqrelo.format.config import CONFIG_NAME
from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.folder import new_folder, require_free
from vllm_dqrelo.format.side_files import TOKENIZER_FILES


def export(base: str, delta: Path, output: Path) -> int:
    """Write base + delta into the new folder ``output``, in the base's dtypes.

    The files are split as the base's are, so that one of them is in memory at a
    time. Everything else in the base's folder is copied, then the delta's own
    tokenizer in the place of the base's and its settings over them.

    Returns:
        The bytes of all its tensors.

    Raises:
        DqreloError: the delta is damaged or belongs to another base.
        FileNotFoundError: one of them is not there.
    """
    source = Checkpoint(resolve(base))
    opened = open_for_base(delta, source)
    names_of: dict[str, list[str]] = {}
    for name in source:
        names_of.setdefault(source.files[name].name, []).append(name)
    require_free(
        output, sum((source.folder / file).stat().st_size for file in names_of)
    )
    total = 0
    progress = tqdm(list(source), desc="export", unit=" tensors", disable=None)
    with new_folder(output) as folder, progress:
        for file, names in names_of.items():
            tensors = {}
            for name in names:
                tensors[name] = merged(name, source.get(name), opened)
                total += tensors[name].nbytes
                progress.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
        if list(names_of) != [f"{MODEL}.safetensors"]:
            index = {name: source.files[name].name for name in source}
            text = {"metadata": {"total_size": total}, "weight_map": index}
            path = folder / f"{MODEL}.safetensors.index.json"
            path.write_text(json.dumps(text, indent=2) + "\n")
        copy_other_files(source.folder, folder)
        if files_of(opened.folder, TOKENIZER_FILES):
            for path in files_of(folder, TOKENIZER_FILES).values():
                path.unlink()
        copy_other_files(opened.folder, folder)
        if source.tied and HEAD in opened.matrices:
            untie_config(folder / "config.json")
    return total


def merged(name: str, before: torch.Tensor, delta: Delta) -> torch.Tensor:
    """The parameter ``name`` of base + delta, in the base's dtype."""
    if name in delta.matrices:
        return (before.float() + delta.matrix(name).dense()).to(before.dtype)
    return delta.parameter(name).to(before.dtype) if name in delta.exact else before


def untie_config(path: Path) -> None:
    """Say in a config.json that the LM head is a matrix of its own."""
    config = json.loads(path.read_text())
    config.get("text_config", config)["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n")


def copy_other_files(source: Path, output: Path) -> None:
    """Copy configuration, tokenizer and texts; no weights, no card of a delta."""
    for path in source.iterdir():
        weights = ".safetensors" in path.suffixes or path.suffix in (".bin", ".pt")
        of_delta = path.name in (CONFIG_NAME, CARD, REPORT)
        if path.is_file() and not weights and not of_delta:
            shutil.copyfile(path, output / path.name)
