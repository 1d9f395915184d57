# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Grouped delta linear: ``y[m] += sum of scale * (S x[m]) + B scratch[m] + bias``.

One launch covers all slices and slots of a site. A program computes a tile of y^T. The
program loads the words of BLOCK_N output features and 256 columns once (layout.py),
decodes the words bit by bit into the tensor core's first operand, and multiplies each
bit with its 16 consecutive columns of up to BLOCK_M rows of one delta. A sum over K is
never split: a row's result depends neither on the other rows nor on their order.
"""

import torch
import triton
import triton.language as tl

from dqrelo_kernels import layout
from dqrelo_kernels.gpu.device import (
    ABSENT,
    BIAS,
    BLOCK,
    FACTOR_DTYPE,
    FIRST_B,
    INT4,
    INT4_BLOCK,
    INT4_BYTES,
    LORA_B,
    PLANES,
    RANK_B,
    SCALE,
    SIGNS,
    WORD_BITS,
    arena_pointer,
    check_rows,
    decode_int4,
    load_factor,
    locate,
    programs,
    row_numbers,
    row_tiles,
    slice_of,
)
from dqrelo_kernels.gpu.tiles import tiles


@triton.jit
def _decode(words, BIT: tl.constexpr, dtype: tl.constexpr, IN_PAIRS: tl.constexpr):
    """Bit ``BIT`` of each word as +1 (set) or -1 of ``dtype``.

    In pairs: two words of a register at a time. The bit moves to the place of a 16-bit
    float's sign; one operation keeps it and fills in 1.0: (t & 0x8000) ^ -1.0. ptxas
    makes two operations of a separate and and xor.
    """
    if IN_PAIRS:
        minus_one: tl.constexpr = 0xBF80BF80 if dtype == tl.bfloat16 else 0xBC00BC00
        bits = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shl.b32 t, $1, {15 - BIT};"
            f" lop3.b32 $0, t, 0x80008000, {minus_one}, 0x6A; }}",
            "=r,r",
            [words],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
        signs = bits.to(dtype, bitcast=True)
    else:
        signs = tl.where(((words >> BIT) & 1) != 0, 1.0, -1.0).to(dtype)
    return signs


@triton.jit
def _add_sign_product(
    part,
    words_ptrs,
    x_ptrs,
    exists,
    width,
    columns,
    NARROW: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``part`` plus one block of signs times its columns of x.

    Args:
        words_ptrs: [BLOCK_N, 1], the block's first word of each output feature.
        x_ptrs: [1, BLOCK_M], the block's first column of each row; some rows exist.
        width, columns: words and columns of the block; full unless NARROW.
    """
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    i = tl.arange(0, WORD_BITS)
    if NARROW:
        words = tl.load(words_ptrs + i[None, :], mask=(i < width)[None, :], other=0)
    else:
        words = tl.load(words_ptrs + i[None, :])
    for bit in tl.static_range(WORD_BITS):
        mask = exists[None, :]
        if NARROW:
            mask &= ((i < width) & (bit * width + i < columns))[:, None]
        x = tl.load(x_ptrs + bit * width + i[:, None], mask=mask, other=0.0)
        signs = _decode(words, bit, dtype, IN_PAIRS)
        part = tl.dot(signs, x, part, input_precision=PRECISION)
    return part


@triton.jit
def _add_int4_product(
    change,
    b_ptr,
    n,
    ax_rows,
    exists,
    first,
    rank,
    dtype: tl.constexpr,
    IN_FOURS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``change`` plus rows n of an int4 B times the scratch from ``first`` on."""
    if (first | rank) % INT4_BLOCK == 0:
        # Whole blocks. The compiler sees that wide loads fit.
        blocks = rank // INT4_BLOCK
        ax_ptrs = ax_rows + first // INT4_BLOCK * INT4_BLOCK
        b_rows = b_ptr + n[:, None] * (blocks * INT4_BYTES)
        i = tl.arange(0, INT4_BYTES)
        for block in tl.range(blocks, num_stages=2):
            pairs = tl.load(b_rows + block * INT4_BYTES + i[None, :])
            for half in tl.static_range(2):
                r = block * INT4_BLOCK + half * INT4_BYTES + i
                ax = tl.load(ax_ptrs + r[:, None], mask=exists[None, :], other=0.0)
                b = decode_int4(pairs, half, dtype, IN_FOURS)
                change = tl.dot(b, ax.to(dtype), change, input_precision=PRECISION)
    else:
        ax_ptrs = ax_rows + first
        row_bytes = tl.cdiv(rank, 2)
        b_rows = b_ptr + n[:, None] * row_bytes
        for first_byte in tl.range(0, row_bytes, BLOCK_R, num_stages=1):
            block = first_byte // INT4_BYTES
            i = first_byte - block * INT4_BYTES + tl.arange(0, BLOCK_R)
            rest = rank - block * INT4_BLOCK
            width = tl.minimum(tl.cdiv(rest, 2), INT4_BYTES)
            pairs = tl.load(
                b_rows + block * INT4_BYTES + i[None, :],
                mask=(i < width)[None, :],
                other=0,
            )
            for half in tl.static_range(2):
                r = half * width + i
                inside = (i < width) & (r < rest)
                ax = tl.load(
                    ax_ptrs + block * INT4_BLOCK + r[:, None],
                    mask=inside[:, None] & exists[None, :],
                    other=0.0,
                )
                b = decode_int4(pairs, half, dtype, IN_FOURS)
                change = tl.dot(b, ax.to(dtype), change, input_precision=PRECISION)
    return change


@triton.jit
def _sign_matmul_kernel(
    y_ptr,
    scratch_ptr,
    x_ptr,
    arena_ptr,
    table_ptr,
    slices_ptr,
    rows_ptr,
    starts_ptr,
    slots,
    K,
    words_per_row,
    stride_ym,
    stride_sm,
    stride_xm,
    stride_ts,
    SLICES: tl.constexpr,
    NARROW_END: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    ends = tl.cumsum(row_tiles(starts_ptr, slots, BLOCK_M, BLOCK_S))
    count = tl.max(ends, axis=0)
    n_tiles = 0
    for j in tl.static_range(SLICES):
        size = tl.load(slices_ptr + j + 1) - tl.load(slices_ptr + j)
        n_tiles += tl.cdiv(size, BLOCK_N)
    for item in range(tl.program_id(0), count * n_tiles, tl.num_programs(0)):
        slot, before = locate(ends, item % count)
        row, exists = row_numbers(
            rows_ptr, starts_ptr, slot, item % count - before, BLOCK_M
        )

        entry_ptr = table_ptr + slot.to(tl.int64) * stride_ts
        tile, entry_ptr, first, size = slice_of(
            item // count, entry_ptr, slices_ptr, SLICES, BLOCK_N
        )
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)

        planes = tl.load(entry_ptr + PLANES).to(tl.int32)
        rank = tl.load(entry_ptr + RANK_B).to(tl.int32)
        bias = tl.load(entry_ptr + BIAS)
        if (planes > 0) | (rank != ABSENT) | (bias != ABSENT):
            change = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            # Features beyond the slice repeat its last one and are not stored.
            n_inside = tl.minimum(n, size - 1).to(tl.int64)
            for plane in tl.range(0, planes, num_stages=1):
                n_plane = size.to(tl.int64) * plane + n_inside
                words_ptr = arena_pointer(arena_ptr, entry_ptr, SIGNS, tl.int16)
                words_ptrs = words_ptr + n_plane[:, None] * words_per_row
                x_ptrs = x_ptr + row[None, :] * stride_xm
                part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
                for block in range(K // BLOCK):
                    part = _add_sign_product(
                        part,
                        words_ptrs + block * WORD_BITS,
                        x_ptrs + block * BLOCK,
                        exists,
                        WORD_BITS,
                        BLOCK,
                        False,
                        IN_PAIRS,
                        PRECISION,
                    )
                if NARROW_END:
                    start = K // BLOCK * BLOCK
                    part = _add_sign_product(
                        part,
                        words_ptrs + start // WORD_BITS,
                        x_ptrs + start,
                        exists,
                        words_per_row - start // WORD_BITS,
                        K - start,
                        True,
                        IN_PAIRS,
                        PRECISION,
                    )
                scale_ptr = arena_pointer(arena_ptr, entry_ptr, SCALE, tl.float32)
                change += part * tl.load(scale_ptr + n_plane)[:, None]
            inside = n < size
            if rank != ABSENT:
                code = tl.load(entry_ptr + FACTOR_DTYPE)
                first_b = tl.load(entry_ptr + FIRST_B).to(tl.int32)
                b_ptr = arena_pointer(arena_ptr, entry_ptr, LORA_B, tl.int16)
                ax_rows = scratch_ptr + row[None, :] * stride_sm
                if code == INT4:
                    change = _add_int4_product(
                        change,
                        b_ptr.to(tl.pointer_type(tl.uint8)),
                        n_inside,
                        ax_rows,
                        exists,
                        first_b,
                        rank,
                        dtype,
                        IN_PAIRS,
                        PRECISION,
                        BLOCK_R,
                    )
                else:
                    b_offset = (tile * BLOCK_N).to(tl.int64) * rank
                    for first_r in tl.range(0, rank, BLOCK_R, num_stages=1):
                        r = first_r + tl.arange(0, BLOCK_R)
                        b = load_factor(
                            b_ptr,
                            b_offset,
                            tl.arange(0, BLOCK_N)[:, None] * rank + r[None, :],
                            inside[:, None] & (r < rank)[None, :],
                            code,
                        )
                        ax = tl.load(
                            ax_rows + (first_b + r)[:, None],
                            mask=(r < rank)[:, None] & exists[None, :],
                            other=0.0,
                        )
                        change = tl.dot(b, ax, change, input_precision=PRECISION)
            if bias != ABSENT:
                bias_ptr = arena_pointer(arena_ptr, entry_ptr, BIAS, tl.float32)
                change += tl.load(bias_ptr + n, mask=inside, other=0.0)[:, None]
            y_ptrs = y_ptr + row[None, :] * stride_ym + (first + n)[:, None]
            mask = inside[:, None] & exists[None, :]
            y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32) + change
            tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


def sign_matmul(
    y: torch.Tensor,
    scratch: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    slices: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """Add every row's delta, with ``scratch`` as ``low_rank`` left it.

    Semantics: ``y[m, j] += sum_p scale_djp * (S_djp x[m]) + B_dj scratch[m,
    first_dj:] + bias_dj`` in slice j over the sign planes p, where first is the table's
    FIRST_B, accumulated in float32, rounded once; for 16-bit x the product with B is
    one of TF32 operands, or of operands of the dtype of x where B is int4.

    Args:
        y: [M, N] float, the elements of a row side by side. Mutated.
        scratch: float32 [>= M, ranks], see ops.py.
        x: [M, K] float, likewise.
        arena, table, slices, rows, starts: see ops.py.
    """
    check_rows(y=y, x=x, scratch=scratch)
    (m, k), (slots, n_slices, _) = x.shape, table.shape
    tile = tiles(m, slots, x.dtype)
    row_tiles_at_most = min(slots, m) + m // tile.block_m
    n_tiles_at_most = y.shape[1] // tile.block_n + n_slices
    _sign_matmul_kernel[(programs(row_tiles_at_most * n_tiles_at_most, x.device),)](
        y_ptr=y,
        scratch_ptr=scratch,
        x_ptr=x,
        arena_ptr=arena,
        table_ptr=table,
        slices_ptr=slices,
        rows_ptr=rows,
        starts_ptr=starts,
        slots=slots,
        K=k,
        words_per_row=layout.words_per_row(k),
        stride_ym=y.stride(0),
        stride_sm=scratch.stride(0),
        stride_xm=x.stride(0),
        stride_ts=table.stride(0),
        SLICES=n_slices,
        NARROW_END=k % layout.BLOCK != 0,
        IN_PAIRS=x.is_cuda and x.dtype != torch.float32,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        BLOCK_S=triton.next_power_of_2(slots),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=16,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.maxnreg,
    )
