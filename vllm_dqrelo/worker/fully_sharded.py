# SPDX-License-Identifier: Apache-2.0
"""``--fully-sharded-loras``: workers that share a layer share both factors of a delta.

Without the option a worker has its shard of the signs and of one factor, and the whole
other factor: A where the layer splits the output, B where the layer splits the input.
With the option a worker has some ranks of the other factor, and the workers add up A x:
a collective for each layer in a step that has deltas.
"""

from collections.abc import Callable

import torch
from vllm.distributed import get_tp_group

from dqrelo_kernels.ops import register
from vllm_dqrelo.worker.sites import Site


def linear_of(site: Site) -> Callable[..., None]:
    """The op that adds deltas to the output of a linear layer."""
    ops = torch.ops.dqrelo
    return ops.sharded_linear_ if site.fully_sharded else ops.delta_linear_


def sharded_linear_(
    y: torch.Tensor,
    scratch: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    slices: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    num_active: torch.Tensor,
) -> None:
    """What ``dqrelo::delta_linear_`` does, of workers that have some ranks each.

    All of a tensor-parallel group call it, for the same rows.
    """
    scratch = scratch[: len(x)].zero_()
    torch.ops.dqrelo.delta_shrink_(
        scratch, x, arena, table, rows, slots, starts, num_active
    )
    scratch = get_tp_group().all_reduce(scratch)
    torch.ops.dqrelo.delta_expand_(
        y, scratch, x, arena, table, slices, rows, slots, starts, num_active
    )


register(sharded_linear_, "y", "scratch")
