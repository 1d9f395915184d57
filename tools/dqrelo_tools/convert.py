# SPDX-License-Identifier: Apache-2.0
"""A base and its fine-tune become a delta folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dqrelo_tools.compress import METHOD, MIN_RATIO, compress, rank_of
from dqrelo_tools.report import Entry, Report, matrix_entry
from vllm_dqrelo.format.checkpoint import FLOAT_DTYPES, Checkpoint, resolve
from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.delta import WEIGHTS_NAME, write_delta
from vllm_dqrelo.format.errors import DqreloError, refuse
from vllm_dqrelo.format.folder import new_folder, require_free
from vllm_dqrelo.format.tensors import SUFFIXES

# What a config.json may say differently without the model computing otherwise.
BOOKKEEPING = {
    "_name_or_path",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
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


def convert(base: str, model: str, output: Path, ratio: float) -> Report:
    """Write the delta from ``base`` to ``model`` into the new folder ``output``.

    Args:
        base: the base model, a folder or a Hub id.
        model: the fine-tune, a folder or a Hub id.
        output: must not exist, or be empty; on any error it is left as it was.
        ratio: size of the delta as a fraction of 16 bits per weight, 1/16 to 1.

    Raises:
        DqreloError: the two do not fit together, or cannot be converted.
        FileNotFoundError: one of them is not there.
    """
    if not MIN_RATIO <= ratio <= 1:
        raise DqreloError(
            f"--ratio {ratio:g} is out of range: the signs alone take {MIN_RATIO} "
            "(1/16), and 1 is the size of the fine-tune"
        )
    before, after = Checkpoint(resolve(base)), Checkpoint(resolve(model))
    refuse(f"{model} is no fine-tune of {base}:", differences(before, after))
    require_free(output, predicted_bytes(after, ratio))
    report = Report()
    tensors: dict[str, torch.Tensor] = {}
    for name in tqdm(list(after), desc="convert", unit=" tensors", disable=None):
        entry, stored = convert_parameter(
            name, before.get(name), after.get(name), ratio
        )
        report.entries.append(entry)
        tensors |= stored
    if not tensors:
        raise DqreloError(f"{model} has the same weights as {base}: nothing to store")
    config = DeltaConfig(
        base_model_name_or_path=base,
        base_fingerprint=before.fingerprint(),
        digest="",
        method=METHOD,
        ratio=ratio,
    )
    with new_folder(output) as folder:
        write_delta(folder, config, tensors)
        copy_side_files(before.folder, after.folder, folder)
    report.delta_bytes = (output / WEIGHTS_NAME).stat().st_size
    return report


def convert_parameter(
    name: str, before: torch.Tensor, after: torch.Tensor, ratio: float
) -> tuple[Entry, dict[str, torch.Tensor]]:
    """One parameter's entry in the report, and its stored tensors."""
    for tensor, side in ((before, "base"), (after, "fine-tune")):
        if not bool(tensor.isfinite().all()):
            raise DqreloError(f"{name} of the {side} has a NaN or an infinity")
    size = (after.numel(), after.nbytes)
    change = after.float() - before.float()
    if not bool(change.any()):
        return Entry(name, "unchanged", *size), {}
    if after.ndim < 2:
        return Entry(name, "exact", *size), {name: after}
    factor_dtype = torch.float16 if after.dtype == torch.float16 else torch.bfloat16
    matrix = compress(change, ratio, factor_dtype)
    return matrix_entry(name, after, change, matrix), matrix.tensors(name)


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


def predicted_bytes(model: Checkpoint, ratio: float) -> int:
    """An upper bound of the delta's size, before anything is computed."""
    total = 1 << 20  # headers and side files
    for name in model:
        _, shape = model.spec(name)
        if len(shape) == 2:
            n, k = shape
            total += 2 * (n * (-(-k // 16)) + rank_of(n, k, ratio) * (n + k)) + 64
        else:
            total += 4 * (shape[0] if shape else 1)
    return total


def copy_side_files(base: Path, model: Path, output: Path) -> None:
    """Copy the fine-tune's tokenizer and settings where the base's are different."""
    for name in SIDE_FILES:
        own, other = model / name, base / name
        if own.is_file() and (not other.is_file() or not same_content(own, other)):
            shutil.copyfile(own, output / name)


def same_content(one: Path, other: Path) -> bool:
    """Equal bytes, or equal JSON (but for the version of what wrote it)."""
    if one.suffix != ".json":
        return one.read_bytes() == other.read_bytes()
    parsed = [json.loads(path.read_text()) for path in (one, other)]
    for value in parsed:
        value.pop("transformers_version", None)
    return parsed[0] == parsed[1]
