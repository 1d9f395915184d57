# SPDX-License-Identifier: Apache-2.0
"""What two checkpoints do not have in common besides the values of their weights."""

import json
import shutil
from pathlib import Path
from typing import Any

from vllm_dqrelo.format.checkpoint import FLOAT_DTYPES, Checkpoint
from vllm_dqrelo.format.tensors import SUFFIXES

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
}
# A fine-tune's own files that travel with the delta when the base's differ.
SIDE_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
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
    found += [f"{n} is only in the fine-tune" for n in sorted(names - others)]
    for name in sorted(names & others):
        (dtype, shape), (base_dtype, base_shape) = model.spec(name), base.spec(name)
        if shape != base_shape:
            found.append(f"{name} is {shape}, the base has {base_shape}")
        if unusable := {dtype, base_dtype} - FLOAT_DTYPES:
            found.append(
                f"{name} is {', '.join(sorted(unusable))}, expected BF16, F16 or F32"
            )
        if len(shape) > 2:
            found.append(f"{name} is {shape}: only vectors and matrices so far")
        if name.endswith(SUFFIXES):
            found.append(f"{name} ends like a tensor of the delta format")
    return found


def config_differences(base: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Keys of config.json that make the two compute differently."""
    keys = sorted((base.keys() | model.keys()) - BOOKKEEPING)
    return [
        f"config.json: {key} is {model.get(key)!r}, the base has {base.get(key)!r}"
        for key in keys
        if base.get(key) != model.get(key)
    ]


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
