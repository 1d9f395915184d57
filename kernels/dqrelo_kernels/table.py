# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of each resident delta lie.

All resident deltas share one buffer of bytes, the *arena*. A *site* is one module
of the model; fused modules (q/k/v, gate/up) have one *slice* per checkpoint matrix.
The table of a site is int64 ``[slots, slices, Field]``: for each delta slot and each
slice, the byte offsets of its tensors in the arena. A field of ``ABSENT`` means
that this delta leaves that part of the matrix alone.

To add a factor dtype: append it to ``FACTOR_DTYPES`` and teach ``reference.lora_a``,
``reference.lora_b`` and the kernels to read it.

Between two kernels A x lies in a row of *scratch*, with the ranks of a slice after the
ranks of earlier slices. A worker that shares a matrix may have only some rows of A and
some columns of B; the table names them by their columns of scratch.
"""

from enum import IntEnum
from typing import NamedTuple

import torch

from dqrelo_kernels.layout import int4_bytes, row_by_row

ABSENT = -1
ALIGNMENT = 64  # bytes; every tensor in the arena starts on a multiple of it

# The code stored in Field.FACTOR_DTYPE is the index in this tuple. A uint8 holds two
# integers of four bits, see layout.py.
FACTOR_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
)
INT4 = torch.uint8


def factor_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes of a factor [rows, columns] of one of ``FACTOR_DTYPES``, as stored."""
    return rows * (int4_bytes(columns) if dtype == INT4 else columns * dtype.itemsize)


class Field(IntEnum):
    """Columns of a table row. Offsets are bytes from the start of the arena."""

    SIGNS = 0  # offset of int16 [PLANES, N, ceil(K / 16)], see layout.py
    PLANES = 1  # sign planes, a number
    SCALE = 2  # offset of float32 [PLANES, N]
    LORA_A = 3  # offset of factor dtype [R, K]; INT4: [R, ceil(K / 2)]
    LORA_B = 4  # offset of factor dtype [N, R]; INT4: [N, ceil(R / 2)]
    LORA_SCALE = 5  # offset of float32 [R of A], which A x is multiplied by; or ABSENT
    RANK_A = 6  # R of LORA_A, a number; ABSENT without it
    RANK_B = 7  # R of LORA_B, likewise
    FIRST_A = 8  # the column of scratch that row 0 of LORA_A is for
    FIRST_B = 9  # the column of scratch that column 0 of LORA_B is for
    FACTOR_DTYPE = 10  # index into FACTOR_DTYPES
    BIAS = 11  # offset of float32 [N], added to the output; a norm's whole bias
    WEIGHT = 12  # offset of float32 [K], a norm's whole weight
    SIDE_BY_SIDE = 13  # 1 if rows of SIGNS, LORA_A and LORA_B do, see layout.py; ABSENT


class SiteDeltas(NamedTuple):
    """The deltas of one site: ``op(..., *deltas, *groups.of_rows)``.

    Attributes:
        arena: uint8 [bytes], shared by all sites.
        table: int64 [slots, slices, Field]; never moves.
        slices: int32 [slices + 1], the first output feature of each slice, then N.
    """

    arena: torch.Tensor
    table: torch.Tensor
    slices: torch.Tensor


OFFSETS = (
    Field.SIGNS,
    Field.SCALE,
    Field.LORA_A,
    Field.LORA_B,
    Field.LORA_SCALE,
    Field.BIAS,
    Field.WEIGHT,
)


def aligned(size: int) -> int:
    """``size`` bytes, rounded up to a multiple of ``ALIGNMENT``."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def empty_table(slots: int, slices: int, device: torch.device | str) -> torch.Tensor:
    """A table int64 [slots, slices, Field] in which every slot changes nothing."""
    return torch.full(
        (slots, slices, len(Field)), ABSENT, dtype=torch.int64, device=device
    )


def place_ranks(entries: torch.Tensor) -> None:
    """Put the ranks of each slice after the ranks of earlier slices.

    Args:
        entries: int64 [..., slices of a row, Field], whose FIRST_A and FIRST_B, 0 if
            absent, count from the first rank of their slice, and of whose A and B one
            has all ranks. Mutated: they count from the first rank of the first slice.
    """
    ranks = entries[..., [Field.RANK_A, Field.RANK_B]].amax(-1).clamp_min(0)
    before = ranks.cumsum(-1) - ranks
    for rank, first in ((Field.RANK_A, Field.FIRST_A), (Field.RANK_B, Field.FIRST_B)):
        moved = entries[..., first].clamp_min(0) + before
        entries[..., first] = moved.where(entries[..., rank] != ABSENT, ABSENT)


def rebase(entries: torch.Tensor, offset: int) -> torch.Tensor:
    """Move the offsets of ``entries`` [slices, Field] by ``offset`` bytes.

    Returns a new tensor; absent fields stay absent.
    """
    moved = entries.clone()
    columns = list(OFFSETS)
    offsets = moved[:, columns]
    moved[:, columns] = torch.where(offsets == ABSENT, ABSENT, offsets + offset)
    return moved


def read(
    arena: torch.Tensor, offset: int, dtype: torch.dtype, *shape: int
) -> torch.Tensor:
    """The tensor of ``dtype`` and ``shape`` at byte ``offset``, as a view."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    return arena[offset : offset + count].view(dtype).view(shape)


def read_matrices(
    arena: torch.Tensor, entry: list[int], field: Field, dtype: torch.dtype, *shape: int
) -> torch.Tensor:
    """Packed matrices [count, rows, columns], whose rows may lie side by side."""
    data = read(arena, entry[field], dtype, *shape)
    if entry[Field.SIDE_BY_SIDE] == ABSENT:
        return data
    matrices = data.view(torch.uint8).flatten(1)
    rows = [row_by_row(matrix, shape[1]) for matrix in matrices]
    return torch.stack(rows).view(dtype)
