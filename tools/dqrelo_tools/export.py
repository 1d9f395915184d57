# SPDX-License-Identifier: Apache-2.0
"""A base and a delta become an ordinary checkpoint again."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from tqdm import tqdm

from dqrelo_tools.card import CARD, REPORT
from dqrelo_tools.side_files import files_of
from dqrelo_tools.verify import open_for_base
from dqrelo_tools.vocabulary import vocabulary_parameters
from vllm_dqrelo.format.checkpoint import (
    HEAD,
    MODEL,
    Checkpoint,
    resolve,
)
from vllm_dqrelo.format.config import CONFIG_NAME
from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.folder import check_output, new_folder, require_free
from vllm_dqrelo.format.side_files import TOKENIZER_FILES
from vllm_dqrelo.format.tensor_file import nbytes


def export(base: str, delta: Path, output: Path) -> int:
    """Write base + delta into the new folder ``output``, in the base's dtypes.

    The files are split as the base's files are; memory holds one file at a time.
    Other files of the base's folder are copied. Then the delta's tokenizer and settings
    replace those of the base.

    Returns:
        The bytes of all its tensors.

    Raises:
        DqreloError: the delta is damaged or belongs to another base.
        FileNotFoundError: one of the two is not there.
    """
    output = check_output(output)
    source = Checkpoint(resolve(base))
    opened = open_for_base(delta, source)
    names_of: dict[str, list[str]] = {}
    for name in source:
        names_of.setdefault(source.files[name].name, []).append(name)
    size = sum(nbytes(*source.spec(name)) for name in source)
    require_free(output, size, source.folder, delta)
    tokens = vocabulary_parameters(source, source.model_config.vocab_size or 0)
    total = 0
    progress = tqdm(list(source), desc="export", unit=" tensors", disable=None)
    with new_folder(output) as folder, progress:
        copy_other_files(source.folder, folder)
        if files_of(opened.folder, TOKENIZER_FILES):
            for path in files_of(folder, TOKENIZER_FILES).values():
                path.unlink()
        copy_other_files(opened.folder, folder)
        update_config(folder / "config.json", source, opened)
        for file, names in names_of.items():
            tensors = {}
            for name in names:
                tensors[name] = opened.merged(name, source.get(name))
                if name in tokens:
                    tensors[name] = tensors[name][: opened.config.vocab_size]
                total += tensors[name].nbytes
                progress.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
        if list(names_of) != [f"{MODEL}.safetensors"]:
            index = {name: source.files[name].name for name in source}
            text = {"metadata": {"total_size": total}, "weight_map": index}
            path = folder / f"{MODEL}.safetensors.index.json"
            path.write_text(json.dumps(text, indent=2) + "\n")
    return total


def update_config(path: Path, base: Checkpoint, delta: Delta) -> None:
    """Change a base's config.json: LM head, vocabulary, 16 bits.

    Args:
        path: of the file.
        base: whose file it was.
        delta: what was added to it.
    """
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    text = config.get("text_config", config)
    if base.model_config.tied and (HEAD in delta.matrices or not base.tied):
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    rows = delta.config.vocab_size
    if delta.added_tokens:
        rows = (base.model_config.vocab_size or 0) + delta.added_tokens
    if rows is not None:
        text["vocab_size"] = rows
        if "vocab_size" in config:
            config["vocab_size"] = rows
        if (text.get("pad_token_id") or 0) >= rows:  # which no model is made with
            text["pad_token_id"] = None
    path.write_text(json.dumps(config, indent=2) + "\n")


def copy_other_files(source: Path, output: Path) -> None:
    """Copy configuration, tokenizer and texts; no weights, no card of a delta."""
    for path in source.iterdir():
        weights = ".safetensors" in path.suffixes or path.suffix in (".bin", ".pt")
        of_delta = path.name in (CONFIG_NAME, CARD, REPORT)
        if path.is_file() and not weights and not of_delta:
            shutil.copyfile(path, output / path.name)
