# SPDX-License-Identifier: Apache-2.0
"""Whether the model computes with the parameters in the order of the checkpoint.

A loader may turn or permute what it reads, as for q/k/v that are stored head by head.
A delta is in the checkpoint's order, and would be another model there.
"""

from typing import Any

import torch

from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.worker.experts import multiply
from vllm_dqrelo.worker.sites import ExpertSite, Place, Sites

SAMPLES = 8  # rows and columns of a matrix


def rearranged(sites: Sites, checkpoint: Checkpoint, device: torch.device) -> set[str]:
    """The parameters of ``checkpoint`` that ``sites`` have in another order.

    Each matrix is tried where rows and columns with index ``i * (size - 1) // 7``
    cross, for i = 0..7. Linear layers and experts are called, so that it does not
    matter how they store their weights; deltas must not be installed yet.
    """
    return {
        name
        for name in checkpoint
        for place in sites.places(name)
        if not _as_stored(place, name, checkpoint, device)
    }


def _as_stored(
    place: Place, name: str, checkpoint: Checkpoint, device: torch.device
) -> bool:
    _, shape = checkpoint.spec(name)
    if tuple(shape) != place.shape:
        return False
    module: Any = place.site.module
    if len(shape) == 1:
        found = place.site.base_vector(place.leaf, place.index)
        return _equal(found, checkpoint.get(name)[place.rows])
    # Of what this worker has; of the checkpoint these are others.
    rows, columns = _spread(len(place.rows)), _spread(len(place.columns))
    stored = torch.cat(list(checkpoint.rows(name, place.rows[rows].tolist())))
    stored = stored[:, place.columns[columns]]
    start = sum(place.site.sizes[: place.index])
    if not hasattr(module, "quant_method"):
        return _equal(module.weight[rows][:, columns], stored)
    x = torch.zeros(len(columns), place.site.columns, dtype=module.params_dtype)
    x[range(len(columns)), columns] = 1
    if isinstance(place.site, ExpertSite):
        expert, index = divmod(place.index, len(place.site.of_a_row))
        start = index * len(place.rows)
        numbers = torch.arange(place.site.experts, device=device)
        ends = (numbers >= expert).int() * len(x)
        y = multiply(place.site.part, module, x.to(device), ends)
    else:
        y = module.quant_method.apply(module, x.to(device))
    return _equal(y[:, [start + row for row in rows]].T, stored)


def _spread(size: int) -> list[int]:
    return sorted({i * (size - 1) // (SAMPLES - 1) for i in range(SAMPLES)})


def _equal(loaded: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether they are the same but for a rounding to the model's dtype."""
    stored = stored.float()
    # bfloat16 is the coarsest of the dtypes that a base is served in.
    slack = torch.finfo(torch.bfloat16).eps * stored.abs().max()
    return bool(((loaded.float().cpu() - stored).abs() <= slack).all())
