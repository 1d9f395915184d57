# SPDX-License-Identifier: Apache-2.0
"""Whether the model computes with the parameters of the checkpoint, in their order.

A loader may turn or permute what it reads, as for q/k/v that are stored head by head.
A delta is in the checkpoint's order, and would be another model there. A loader may
also quantise a weight again, with other scales. A delta is of the stored numbers.
"""

from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
)

from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.worker.experts import multiply
from vllm_dqrelo.worker.sites import ExpertSite, Place, Sites

SAMPLES = 8  # rows and columns of a matrix

REARRANGED = (
    "vLLM has it in another order than the checkpoint, which deltas cannot follow"
)
REQUANTISED = (
    "vLLM quantises it again when it loads it, and deltas are of the checkpoint's "
    "numbers. It does so for DeepGEMM with scales that are powers of two (set "
    "VLLM_USE_DEEP_GEMM=0), and where it fuses matrices that have one scale each "
    "(take a base with a scale for each row)"
)
# Of the largest number: an element that is rounded to FP8 again loses at most 1/16.
REQUANTISED_ERROR = 1 / 8


def unlike(
    sites: Sites, checkpoint: Checkpoint, device: torch.device
) -> dict[str, str]:
    """The parameters of ``checkpoint`` that ``sites`` have otherwise, and how.

    Each matrix is tried where rows and columns with index ``i * (size - 1) // 7``
    cross, for i = 0..7. Linear layers and experts are called, so that it does not
    matter how they store their weights; deltas must not be installed yet.

    Returns:
        Name -> REARRANGED or REQUANTISED.
    """
    return {
        name: difference
        for name in checkpoint
        for place in sites.places(name)
        if (difference := _difference(place, name, checkpoint, device))
    }


def _difference(
    place: Place, name: str, checkpoint: Checkpoint, device: torch.device
) -> str | None:
    _, shape = checkpoint.spec(name)
    if tuple(shape) != place.shape:
        return REARRANGED
    module: Any = place.site.module
    if len(shape) == 1:
        found = place.site.base_vector(place.leaf, place.index)
        return compare(found, checkpoint.get(name)[place.rows])
    # Of what this worker has; of the checkpoint these are others.
    rows, columns = _spread(len(place.rows)), _spread(len(place.columns))
    stored = torch.cat(list(checkpoint.rows(name, place.rows[rows].tolist())))
    stored = stored[:, place.columns[columns]]
    start = sum(place.site.sizes[: place.index])
    if not hasattr(module, "quant_method"):
        return compare(module.weight[rows][:, columns], stored)
    amplitude = _amplitude(module)
    x = torch.zeros(len(columns), place.site.columns, dtype=module.params_dtype)
    x[range(len(columns)), columns] = amplitude
    if isinstance(place.site, ExpertSite):
        expert, index = divmod(place.index, len(place.site.of_a_row))
        start = index * len(place.rows)
        numbers = torch.arange(place.site.experts, device=device)
        ends = (numbers >= expert).int() * len(x)
        y = multiply(place.site.part, module, x.to(device), ends)
    else:
        y = module.quant_method.apply(module, x.to(device))
    y = y[:, [start + row for row in rows]].T.float() / amplitude
    unquantised = UnquantizedLinearMethod, UnquantizedEmbeddingMethod
    quantised = not isinstance(place.site, ExpertSite)
    quantised &= not isinstance(module.quant_method, unquantised)
    return compare(y, stored, quantised)


def _spread(size: int) -> list[int]:
    return sorted({i * (size - 1) // (SAMPLES - 1) for i in range(SAMPLES)})


def _amplitude(module: Any) -> float:
    """A number that a layer's activations can have without being rounded, but for 0.

    A layer with a static scale rounds its input to multiples of the scale, and clips
    it. Another layer takes its scale from its input.
    """
    scale = getattr(module, "input_scale", None)
    return 1.0 if scale is None else float(scale.detach().max())


def compare(
    loaded: torch.Tensor, stored: torch.Tensor, quantised: bool = False
) -> str | None:
    """How they differ by more than a rounding to the model's dtype; None: they do not.

    Args:
        quantised: whether vLLM may have quantised the loaded numbers again.
    """
    stored = stored.float()
    largest = stored.abs().max()
    error = (loaded.float().cpu() - stored).abs().max()
    # bfloat16 is the coarsest of the dtypes that a base is served in.
    if error <= torch.finfo(torch.bfloat16).eps * largest:
        return None
    again = quantised and bool(error <= REQUANTISED_ERROR * largest)
    return REQUANTISED if again else REARRANGED
