# SPDX-License-Identifier: Apache-2.0
"""What two checkpoints do not have in common besides the values of their weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from vllm_dqrelo.format.checkpoint import FLOAT_DTYPES, Checkpoint
from vllm_dqrelo.format.tensors import ADDED, SUFFIXES

# What a config.json may say differently without the model computing otherwise.
BOOKKEEPING = {
    "_name_or_path",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",  # convert.py stores an LM head that only one of them has
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",  # added tokens are stored; see split_added_tokens
}
# A fine-tune's own files that travel with the delta when the base's differ.
SIDE_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def differences(base: Checkpoint, model: Checkpoint) -> list[str]:
    """Everything that keeps ``model`` from being a fine-tune of ``base``."""
    found = [
        f"{checkpoint.folder} is quantised; convert from the 16-bit checkpoint"
        for checkpoint in (base, model)
        if "quantization_config" in checkpoint.config
    ]
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


def unserved(base: Path, model: Path) -> list[str]:
    """What the fine-tune has of its own and a server takes from the base."""
    found = [name for name in SIDE_FILES if is_own(base, model, name)]
    configs = [folder / "config.json" for folder in (base, model)]
    if configs[1].is_file():  # an adapter has none
        old, own = (json.loads(p.read_text()).get("eos_token_id") for p in configs)
        if old != own:
            found.append(f"eos_token_id ({own}, the base has {old})")
    return found


def is_own(base: Path, model: Path, name: str) -> bool:
    """Whether ``model`` has a file that ``base`` lacks or has otherwise."""
    own, other = model / name, base / name
    return own.is_file() and (not other.is_file() or not same_content(own, other))


def copy_side_files(base: Path, model: Path, output: Path) -> None:
    """Copy the fine-tune's tokenizer and settings where the base's are different."""
    for name in SIDE_FILES:
        if is_own(base, model, name):
            shutil.copyfile(model / name, output / name)


def same_content(one: Path, other: Path) -> bool:
    """Equal bytes, or equal JSON (but for the version of what wrote it)."""
    if one.suffix != ".json":
        return one.read_bytes() == other.read_bytes()
    parsed = [json.loads(path.read_text()) for path in (one, other)]
    for value in parsed:
        value.pop("transformers_version", None)
    return parsed[0] == parsed[1]
