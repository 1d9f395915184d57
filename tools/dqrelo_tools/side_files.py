# SPDX-License-Identifier: Apache-2.0
"""The files that a delta takes from its fine-tune: tokenizer and generation config."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_dqrelo.format.side_files import GENERATION_CONFIG, TOKENIZER_FILES


def copy_side_files(base: Path, model: Path, output: Path) -> None:
    """Give a delta the tokenizer and the generation config that it has of its own.

    A tokenizer is all of its files: mixed with the base's, it would be neither's. A
    fine-tune without any is used with the base's.
    """
    own = files_of(model, TOKENIZER_FILES)
    if own and not same_files(own, files_of(base, TOKENIZER_FILES)):
        for path in own.values():
            shutil.copyfile(path, output / path.name)
    config = generation_config(model)
    if config is not None and config != generation_config(base):
        if (path := model / GENERATION_CONFIG).is_file():
            shutil.copyfile(path, output / GENERATION_CONFIG)
        else:
            text = json.dumps(config, indent=2) + "\n"
            (output / GENERATION_CONFIG).write_text(text)


def files_of(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Those of the files that are there, by name."""
    return {name: path for name in names if (path := folder / name).is_file()}


def same_files(some: dict[str, Path], others: dict[str, Path]) -> bool:
    """Whether two folders have the same of these files, with the same content."""
    return some.keys() == others.keys() and all(
        same_content(some[name], others[name]) for name in some
    )


def generation_config(folder: Path) -> dict[str, Any] | None:
    """How a model generates: its generation_config.json, or what config.json says."""
    if (path := folder / GENERATION_CONFIG).is_file():
        return parsed(path)
    if not (path := folder / "config.json").is_file():
        return None  # an adapter
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {
        key: value for key in tokens if (value := parsed(path).get(key)) is not None
    }


def same_content(one: Path, other: Path) -> bool:
    """Equal bytes, or equal JSON (but for the version of what wrote it)."""
    if one.suffix != ".json":
        return one.read_bytes() == other.read_bytes()
    return parsed(one) == parsed(other)


def parsed(path: Path) -> dict[str, Any]:
    """A JSON file, without the version of what wrote it."""
    value = json.loads(path.read_text())
    value.pop("transformers_version", None)
    return value
