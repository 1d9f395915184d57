# SPDX-License-Identifier: Apache-2.0
"""The ops on a GPU: what each one launches, without the guard on ``num_active``."""

import torch

from dqrelo_kernels.gpu.low_rank import low_rank
from dqrelo_kernels.gpu.merge import merge as merge_
from dqrelo_kernels.gpu.rowwise import embedding as delta_embedding_
from dqrelo_kernels.gpu.rowwise import norm as delta_norm_
from dqrelo_kernels.gpu.sign_matmul import sign_matmul

__all__ = [
    "delta_embedding_",
    "delta_expand_",
    "delta_linear_",
    "delta_norm_",
    "delta_shrink_",
    "merge_",
]


def delta_linear_(
    y: torch.Tensor,
    scratch: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    slices: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """Write A x to the scratch, then add signs, B and bias."""
    low_rank(scratch, x, arena, table, rows, starts)
    sign_matmul(y, scratch, x, arena, table, slices, rows, starts)


def delta_shrink_(
    scratch: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """Write A x to the scratch."""
    low_rank(scratch, x, arena, table, rows, starts)


def delta_expand_(
    y: torch.Tensor,
    scratch: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    slices: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """Add signs, B and bias; the scratch holds A x."""
    sign_matmul(y, scratch, x, arena, table, slices, rows, starts)
