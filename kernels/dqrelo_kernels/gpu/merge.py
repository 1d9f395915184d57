# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The base's weight with one delta in it: ``weight + sum of scale * S + B A``.

A delta with many rows in a step (a prompt) costs least this way: the kernel makes the
merged matrix once, and one dense product replaces the base's and the delta's.
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
    LORA_A,
    LORA_B,
    LORA_SCALE,
    PLANES,
    RANK_B,
    SCALE,
    SIGNS,
    WORD_BITS,
    arena_pointer,
    check_rows,
    load_elements,
    slice_of,
)


@triton.jit(do_not_specialize=["slot"])  # any slot may be merged while it serves
def _merge_kernel(
    merged_ptr,
    merged_bias_ptr,
    weight_ptr,
    bias_ptr,
    arena_ptr,
    table_ptr,
    slices_ptr,
    slot,
    K,
    words_per_row,
    stride_wn,
    stride_ts,
    SLICES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    entry_ptr = table_ptr + slot.to(tl.int64) * stride_ts
    tile, entry_ptr, first, size = slice_of(
        tl.program_id(0), entry_ptr, slices_ptr, SLICES, BLOCK_N
    )
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    exists = n < size
    inside = exists[:, None] & (k < K)[None, :]
    n = n.to(tl.int64)
    change = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)

    # Column k is bit `within // width` of word `within % width` of its block.
    block = k // BLOCK
    within = k % BLOCK
    width = tl.minimum(words_per_row - block * WORD_BITS, WORD_BITS)
    width = tl.maximum(width, 1)
    word = block * WORD_BITS + within % width
    for plane in range(tl.load(entry_ptr + PLANES).to(tl.int32)):
        n_plane = size.to(tl.int64) * plane + n
        words_ptr = arena_pointer(arena_ptr, entry_ptr, SIGNS, tl.int16)
        words_ptrs = words_ptr + n_plane[:, None] * words_per_row + word[None, :]
        words = tl.load(words_ptrs, mask=inside, other=0).to(tl.int32)
        scale_ptr = arena_pointer(arena_ptr, entry_ptr, SCALE, tl.float32)
        scale = tl.load(scale_ptr + n_plane, mask=exists, other=0.0)[:, None]
        positive = ((words >> (within // width)[None, :]) & 1) != 0
        change += tl.where(positive, scale, -scale)

    rank = tl.load(entry_ptr + RANK_B).to(tl.int32)
    if rank != ABSENT:
        code = tl.load(entry_ptr + FACTOR_DTYPE)
        a_ptr = arena_pointer(arena_ptr, entry_ptr, LORA_A, tl.int16)
        b_ptr = arena_pointer(arena_ptr, entry_ptr, LORA_B, tl.int16)
        scale_ptr = arena_pointer(arena_ptr, entry_ptr, LORA_SCALE, tl.float32)
        scaled = tl.load(entry_ptr + LORA_SCALE) != ABSENT
        for first_r in range(0, rank, BLOCK_R):
            r = first_r + tl.arange(0, BLOCK_R)
            wanted = r < rank
            b_mask = exists[:, None] & wanted[None, :]
            b = load_elements(b_ptr, n[:, None], r[None, :], rank, b_mask, code)
            a_mask = wanted[:, None] & (k < K)[None, :]
            a_row = r.to(tl.int64)[:, None]
            a = load_elements(a_ptr, a_row, k[None, :], K, a_mask, code)
            if scaled:
                a *= tl.load(scale_ptr + r, mask=wanted, other=0.0)[:, None]
            if NARROW:
                a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
            change = tl.dot(b, a, change, input_precision=PRECISION)

    row = first + n
    weight_ptrs = weight_ptr + row[:, None] * stride_wn + k[None, :]
    weight = tl.load(weight_ptrs, mask=inside, other=0.0).to(tl.float32)
    merged_ptrs = merged_ptr + row[:, None] * K + k[None, :]
    dtype = merged_ptr.dtype.element_ty
    tl.store(merged_ptrs, (weight + change).to(dtype), mask=inside)

    if tl.program_id(1) == 0:
        bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
        if HAS_BIAS:
            bias += tl.load(bias_ptr + row, mask=exists, other=0.0).to(tl.float32)
        if tl.load(entry_ptr + BIAS) != ABSENT:
            change_ptr = arena_pointer(arena_ptr, entry_ptr, BIAS, tl.float32)
            bias += tl.load(change_ptr + n, mask=exists, other=0.0)
        tl.store(merged_bias_ptr + row, bias.to(dtype), mask=exists)


def merge(
    merged: torch.Tensor,
    merged_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arena: torch.Tensor,
    table: torch.Tensor,
    slices: torch.Tensor,
    slot: int,
) -> None:
    """Make the matrix and the bias of a linear layer with one delta in them.

    Semantics: ``merged_j = weight_j + sum_p scale_jp * S_jp + B_j (lora_scale_j *
    A_j)`` and ``merged_bias_j = bias_j + change of bias_j`` in slice j, summed in
    float32 and rounded once. B and lora_scale * A are rounded to bfloat16 first for
    bfloat16 weights, to TF32 for float16 ones.

    Args:
        merged: [N, K] of the dtype of ``weight``, contiguous. Mutated.
        merged_bias: [N] of the same dtype. Mutated.
        weight: [N, K] float, the elements of a row side by side.
        bias: [N] of the same dtype, or None, which stands for zeros.
        arena, table, slices: see ops.py.
        slot: the delta.
    """
    check_rows(merged=merged, merged_bias=merged_bias, weight=weight, bias=bias)
    n, k = weight.shape
    block_n, block_k = 64, 64
    n_slices = table.shape[1]
    _merge_kernel[(n // block_n + n_slices, triton.cdiv(k, block_k))](
        merged_ptr=merged,
        merged_bias_ptr=merged_bias,
        weight_ptr=weight,
        bias_ptr=bias,
        arena_ptr=arena,
        table_ptr=table,
        slices_ptr=slices,
        slot=slot,
        K=k,
        words_per_row=layout.words_per_row(k),
        stride_wn=weight.stride(0),
        stride_ts=table.stride(0),
        SLICES=n_slices,
        HAS_BIAS=bias is not None,
        NARROW=weight.dtype == torch.bfloat16,
        PRECISION="ieee" if weight.dtype == torch.float32 else "tf32",
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=16,
        num_warps=8,
    )
