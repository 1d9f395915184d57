# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The first half of a low-rank product: ``scratch[m] = lora_scale * (A x[m])``."""

import torch
import triton
import triton.language as tl

from dqrelo_kernels import layout
from dqrelo_kernels import table as t
from dqrelo_kernels.gpu.device import (
    ABSENT,
    FACTOR_DTYPE,
    FIELDS,
    FIRST_A,
    INT4,
    INT4_BLOCK,
    INT4_BYTES,
    LORA_A,
    LORA_SCALE,
    RANK_A,
    arena_pointer,
    check_rows,
    decode_int4,
    load_factor,
    locate,
    programs,
    row_numbers,
    row_tiles,
)
from dqrelo_kernels.gpu.tiles import are_tall


@triton.jit
def _low_rank_kernel(
    scratch_ptr,
    x_ptr,
    arena_ptr,
    table_ptr,
    rows_ptr,
    starts_ptr,
    slots,
    K,
    int4_bytes,
    stride_sm,
    stride_xm,
    stride_ts,
    SLICES: tl.constexpr,
    NATIVE: tl.constexpr,
    NARROW_END: tl.constexpr,
    IN_FOURS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    s = tl.arange(0, BLOCK_S)
    tiles = row_tiles(starts_ptr, slots, BLOCK_M, BLOCK_S)
    rank_tiles = tl.zeros((BLOCK_S,), dtype=tl.int32)
    for j in tl.static_range(SLICES):
        field_ptr = table_ptr + s.to(tl.int64) * stride_ts + j * FIELDS + RANK_A
        ranks = tl.maximum(tl.load(field_ptr, mask=tiles > 0, other=0), 0)
        rank_tiles += tl.cdiv(ranks.to(tl.int32), BLOCK_R)
    ends = tl.cumsum(tiles * rank_tiles)
    k = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BLOCK_K // 2)
    for item in range(tl.program_id(0), tl.max(ends, axis=0), tl.num_programs(0)):
        slot, before = locate(ends, item)
        count = tl.cdiv(
            tl.load(starts_ptr + slot + 1) - tl.load(starts_ptr + slot), BLOCK_M
        )
        row, exists = row_numbers(
            rows_ptr, starts_ptr, slot, (item - before) % count, BLOCK_M
        )

        # The slice of this rank tile, and its first rank.
        tile = (item - before) // count
        entry_ptr = table_ptr + slot.to(tl.int64) * stride_ts
        first_r = tile * BLOCK_R
        rank = tl.maximum(tl.load(entry_ptr + RANK_A), 0).to(tl.int32)
        for _ in tl.static_range(SLICES - 1):
            if first_r >= rank:
                first_r -= tl.cdiv(rank, BLOCK_R) * BLOCK_R
                entry_ptr += FIELDS
                rank = tl.maximum(tl.load(entry_ptr + RANK_A), 0).to(tl.int32)

        r = first_r + tl.arange(0, BLOCK_R)
        wanted = (r < rank)[:, None]
        code = tl.load(entry_ptr + FACTOR_DTYPE)
        a_ptr = arena_pointer(arena_ptr, entry_ptr, LORA_A, tl.int16)
        a_start = first_r.to(tl.int64) * K
        a_offsets = tl.arange(0, BLOCK_R)[:, None] * K + k[None, :]
        x_rows = x_ptr + row[None, :] * stride_xm
        x_ptrs = x_rows + k[:, None]
        acc = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)
        if code == INT4:
            a_rows = (
                a_ptr.to(tl.pointer_type(tl.uint8))
                + r[:, None].to(tl.int64) * int4_bytes
            )
            lower = byte // INT4_BYTES * INT4_BLOCK + byte % INT4_BYTES
            full = K // INT4_BLOCK * INT4_BYTES
            for first in range(0, full, BLOCK_K // 2):
                inside = byte < full - first
                pairs = tl.load(
                    a_rows + first + byte[None, :],
                    mask=wanted & inside[None, :],
                    other=0,
                )
                for half in tl.static_range(2):
                    x = tl.load(
                        x_rows + 2 * first + half * INT4_BYTES + lower[:, None],
                        mask=inside[:, None] & exists[None, :],
                        other=0.0,
                    )
                    a = decode_int4(pairs, half, dtype, IN_FOURS)
                    acc = tl.dot(a, x, acc, input_precision=PRECISION)
            if NARROW_END:
                i = tl.arange(0, INT4_BYTES)
                width = int4_bytes - full
                pairs = tl.load(
                    a_rows + full + i[None, :],
                    mask=wanted & (i < width)[None, :],
                    other=0,
                )
                for half in tl.static_range(2):
                    at = 2 * full + half * width + i
                    x = tl.load(
                        x_rows + at[:, None],
                        mask=((i < width) & (at < K))[:, None] & exists[None, :],
                        other=0.0,
                    )
                    a = decode_int4(pairs, half, dtype, IN_FOURS)
                    acc = tl.dot(a, x, acc, input_precision=PRECISION)
        elif code == NATIVE:
            a_ptrs = a_ptr.to(tl.pointer_type(dtype)) + a_start + a_offsets
            for first in range(0, K, BLOCK_K):
                inside = k < K - first
                a = tl.load(a_ptrs + first, mask=wanted & inside[None, :], other=0.0)
                x = tl.load(
                    x_ptrs + first, mask=inside[:, None] & exists[None, :], other=0.0
                )
                acc = tl.dot(a, x, acc, input_precision=PRECISION)
        else:
            for first in range(0, K, BLOCK_K):
                inside = k < K - first
                mask = wanted & inside[None, :]
                a = load_factor(a_ptr, a_start, a_offsets + first, mask, code)
                x = tl.load(
                    x_ptrs + first, mask=inside[:, None] & exists[None, :], other=0.0
                )
                acc = tl.dot(a, x.to(tl.float32), acc, input_precision=PRECISION)
        if tl.load(entry_ptr + LORA_SCALE) != ABSENT:
            scale_ptr = arena_pointer(arena_ptr, entry_ptr, LORA_SCALE, tl.float32)
            acc *= tl.load(scale_ptr + r, mask=r < rank, other=0.0)[:, None]
        column = tl.load(entry_ptr + FIRST_A).to(tl.int32)
        out_ptrs = scratch_ptr + row[None, :] * stride_sm + (column + r)[:, None]
        tl.store(out_ptrs, acc, mask=wanted & exists[None, :])


def low_rank(
    scratch: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """Multiply every row by the A of its delta, for all slices.

    Semantics: ``scratch[m, first_dj + r] = lora_scale_dj[r] * (A_dj[r] . x[m])``, where
    first is the table's FIRST_A and an absent lora_scale is 1.
    Products of integer or 16-bit factors and 16-bit activations are exact. Float32
    factors are rounded to TF32 before a product with 16-bit activations.

    Args:
        scratch: float32 [>= M, ranks], see ops.py. Mutated where a rank exists.
        x: [M, K] float.
        arena, table, rows, starts: see ops.py.
    """
    check_rows(x=x, scratch=scratch)
    (m, k), (slots, slices, _) = x.shape, table.shape
    tall = are_tall(m, slots) and x.dtype != torch.float32
    block_m, stages = (64, 3) if tall else (16, 4)
    # Both are the same for all heights. A row's bits do not depend on the height: an
    # int4 sum goes by halves of block_k, and Hopper takes wgmma from block_r 64 on.
    block_r, block_k = 32, 128
    row_tiles_at_most = min(slots, m) + m // block_m
    rank_tiles_at_most = scratch.shape[1] // block_r + slices
    _low_rank_kernel[(programs(row_tiles_at_most * rank_tiles_at_most, x.device),)](
        scratch_ptr=scratch,
        x_ptr=x,
        arena_ptr=arena,
        table_ptr=table,
        rows_ptr=rows,
        starts_ptr=starts,
        slots=slots,
        K=k,
        int4_bytes=layout.int4_bytes(k),
        stride_sm=scratch.stride(0),
        stride_xm=x.stride(0),
        stride_ts=table.stride(0),
        SLICES=slices,
        NATIVE=t.FACTOR_DTYPES.index(x.dtype),
        NARROW_END=k % layout.INT4_BLOCK != 0,
        IN_FOURS=x.is_cuda and x.dtype != torch.float32,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        BLOCK_S=triton.next_power_of_2(slots),
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_K=block_k,
        num_warps=2,  # each warp of a tall tile decodes all of A
        num_stages=stages,
    )
