# SPDX-License-Identifier: Apache-2.0
"""What keeps one checkpoint from being a fine-tune of another."""

import re

import torch

from dqrelo_tools.configs import config_differences
from vllm_dqrelo.format.checkpoint import FLOAT_DTYPES, Checkpoint
from vllm_dqrelo.format.tensors import ADDED, SUFFIXES

# Of a multimodal model, what is not its language model: a server refuses deltas of it,
# a model that is exported has it.
BESIDE = re.compile(r"(^|\.)(vis|audio|connector|multi_modal_projector|mm_projector)")


def differences(base: Checkpoint, model: Checkpoint) -> list[str]:
    """Everything that keeps ``model`` from being a fine-tune of ``base``."""
    found = []
    if model.quantization:
        found += [f"{model.folder} is quantised; convert from the 16-bit checkpoint"]
    found += config_differences(base.model_config, model.model_config)
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
        if len(shape) > 2 and not BESIDE.search(name) and changed(name, base, model):
            found.append(
                f"{name} is {shape} and was changed: only vectors and matrices can be"
            )
        if name.endswith((*SUFFIXES, ADDED)):
            found.append(f"{name} ends like a tensor of the delta format")
    return found


def changed(name: str, base: Checkpoint, model: Checkpoint) -> bool:
    """Whether the fine-tune has other values there; reads both."""
    return not torch.equal(base.get(name).float(), model.get(name).float())
