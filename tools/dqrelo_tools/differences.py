# SPDX-License-Identifier: Apache-2.0
"""Why a checkpoint is not a fine-tune of another."""

import torch

from dqrelo_tools.configs import config_differences
from dqrelo_tools.missing import missing
from vllm_dqrelo.format.checkpoint import BESIDE, FLOAT_DTYPES, Checkpoint
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.tensors import ADDED, SUFFIXES


def differences(base: Checkpoint, model: Checkpoint) -> list[str]:
    """All reasons why ``model`` is not a fine-tune of ``base``."""
    found = []
    if model.quantization:
        found += [f"{model.folder} is quantised. Convert the 16-bit checkpoint"]
    found += config_differences(base.model_config, model.model_config)
    found += missing(base, model)
    for name in sorted(set(model) & set(base)):
        (dtype, shape), (base_dtype, base_shape) = model.spec(name), base.spec(name)
        if shape != base_shape:
            found.append(f"{name} is {shape}, the base has {base_shape}")
        if unusable := {dtype, base_dtype} - FLOAT_DTYPES:
            found.append(
                f"{name} is {', '.join(sorted(unusable))}, expected BF16, F16 or F32"
            )
        if len(shape) > 2 and not BESIDE.search(name) and changed(name, base, model):
            found.append(
                f"{name} is {shape} and was changed: a delta has only vectors and "
                "matrices"
            )
        if name.endswith((*SUFFIXES, ADDED)):
            found.append(f"{name} ends like a tensor of the delta format")
    return found


def refuse_placeholders(base: Checkpoint, model: Checkpoint) -> None:
    """Refuse the empty tensors that DeepSpeed ZeRO-3 saves for sharded parameters."""
    both = sorted(set(model) & set(base))
    empty = [n for n in both if 0 in model.spec(n)[1] and 0 not in base.spec(n)[1]]
    if empty:
        raise DqreloError(
            f"{model.folder}: {len(empty)} parameters of the fine-tune are empty, for "
            f"instance {empty[0]}: DeepSpeed ZeRO-3 saved the parameters without "
            "gathering them. Run DeepSpeed's zero_to_fp32.py, or set "
            "stage3_gather_16bit_weights_on_model_save and save again"
        )


def changed(name: str, base: Checkpoint, model: Checkpoint) -> bool:
    """Whether base and fine-tune have different values of ``name``; reads both."""
    return not torch.equal(base.get(name).float(), model.get(name).float())
