# SPDX-License-Identifier: Apache-2.0
"""What two checkpoints do not have in common besides the values of their weights."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vllm_dqrelo.format.checkpoint import FLOAT_DTYPES, Checkpoint
from vllm_dqrelo.format.side_files import GENERATION_CONFIG, TOKENIZER_FILES
from vllm_dqrelo.format.tensors import ADDED, SUFFIXES

# What a config.json may say differently without the model computing otherwise.
BOOKKEEPING = {
    "_name_or_path",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",  # of the base, which is read as what it stands for
    "tie_word_embeddings",  # convert.py stores an LM head that only one of them has
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",  # added tokens are stored; see split_added_tokens
}


def differences(base: Checkpoint, model: Checkpoint) -> list[str]:
    """Everything that keeps ``model`` from being a fine-tune of ``base``."""
    found = []
    if model.quantization:
        found += [f"{model.folder} is quantised; convert from the 16-bit checkpoint"]
    found += config_differences(base.config, model.config)
    names, others = set(model), set(base)
    found += [f"{n} is only in the base" for n in sorted(others - names)]
    found += [
        f"{n} is only in the fine-tune"
        for n in sorted(names - others)
        if not n.endswith(ADDED)
    ]
    for name in sorted(names & others):
        (dtype, shape), (base_dtype, base_shape) = model.spec(name), base.spec(name)
        if shape != base_shape:
            found.append(f"{name} is {shape}, the base has {base_shape}")
        if unusable := {dtype, base_dtype} - FLOAT_DTYPES:
            found.append(
                f"{name} is {', '.join(sorted(unusable))}, expected BF16, F16 or F32"
            )
        if len(shape) > 2 and changed(name, base, model):
            found.append(
                f"{name} is {shape} and was changed: only vectors and matrices can be"
            )
        if name.endswith((*SUFFIXES, ADDED)):
            found.append(f"{name} ends like a tensor of the delta format")
    return found


def changed(name: str, base: Checkpoint, model: Checkpoint) -> bool:
    """Whether the fine-tune has other values there; reads both."""
    return not torch.equal(base.get(name).float(), model.get(name).float())


def config_differences(base: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Keys of config.json that make the two compute differently."""
    old, own = computing(base), computing(model)
    return [
        f"config.json: {key} is {own.get(key)!r}, the base has {old.get(key)!r}"
        for key in sorted(old.keys() | own.keys())
        if old.get(key) != own.get(key)
    ]


def computing(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that says how to compute, text_config's included."""
    return {
        key: computing(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in BOOKKEEPING
    }


def split_added_tokens(base: Checkpoint, model: Checkpoint) -> None:
    """Let the rows of tokens that ``model`` added be parameters of their own.

    They are what its vocabulary matrices have beyond the base's ``vocab_size`` rows.
    """
    old, own = (vocabulary(checkpoint.config) for checkpoint in (base, model))
    if old is None or own is None or own <= old:
        return
    for name in set(base) & set(model):
        shape, base_shape = model.spec(name)[1], base.spec(name)[1]
        if len(shape) == 2 and (shape[0], base_shape[0]) == (own, old):
            model.split(name, old)


def vocabulary(config: dict[str, Any]) -> int | None:
    """The rows of the embedding, as a config.json has it."""
    return config.get("text_config", config).get("vocab_size")


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
