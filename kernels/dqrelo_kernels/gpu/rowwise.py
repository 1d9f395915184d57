# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Deltas of an embedding and of a norm: row by row, nothing shared between rows.

embedding  y[m] += sum of scale * S[ids[m]] + B[ids[m]] (lora_scale * A)
norm       y[m, g] = z / sqrt(mean(z^2) + eps) * weight + bias, z = x[m, g] (- its mean)
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
    WEIGHT,
    WORD_BITS,
    arena_pointer,
    check_rows,
    load_elements,
)


@triton.jit
def _embedding_kernel(
    y_ptr,
    ids_ptr,
    arena_ptr,
    table_ptr,
    vocab_ptr,
    rows_ptr,
    slots_ptr,
    K,
    words_per_row,
    stride_ym,
    stride_ts,
    BLOCK_R: tl.constexpr,
):
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64)
    if row >= 0:
        slot = tl.load(slots_ptr + tl.program_id(0)).to(tl.int64)
        entry_ptr = table_ptr + slot * stride_ts
        token = tl.load(ids_ptr + row).to(tl.int64)
        block = tl.program_id(1)
        i = tl.arange(0, BLOCK)
        k = block * BLOCK + i
        inside = k < K
        change = tl.zeros((BLOCK,), dtype=tl.float32)
        vocab = tl.load(vocab_ptr + 1).to(tl.int64)
        for plane in range(tl.load(entry_ptr + PLANES).to(tl.int32)):
            n = plane * vocab + token
            # Bit i // width of word i % width; only the last block can be narrow.
            width = tl.minimum(words_per_row - block * WORD_BITS, WORD_BITS)
            words_ptr = arena_pointer(arena_ptr, entry_ptr, SIGNS, tl.int16)
            words_ptr += n * words_per_row + block * WORD_BITS
            words = tl.load(words_ptr + i % width, mask=inside, other=0)
            set_ = (words.to(tl.int32) >> (i // width)) & 1
            scale = tl.load(arena_pointer(arena_ptr, entry_ptr, SCALE, tl.float32) + n)
            change += tl.where(set_ != 0, scale, -scale)
        rank = tl.load(entry_ptr + RANK_B).to(tl.int32)
        if rank != ABSENT:
            code = tl.load(entry_ptr + FACTOR_DTYPE)
            scaled = tl.load(entry_ptr + LORA_SCALE) != ABSENT
            a_ptr = arena_pointer(arena_ptr, entry_ptr, LORA_A, tl.int16)
            b_ptr = arena_pointer(arena_ptr, entry_ptr, LORA_B, tl.int16)
            scale_ptr = arena_pointer(arena_ptr, entry_ptr, LORA_SCALE, tl.float32)
            for first_r in range(0, rank, BLOCK_R):
                r = first_r + tl.arange(0, BLOCK_R)
                b = load_elements(b_ptr, token, r, rank, r < rank, code)
                if scaled:
                    b *= tl.load(scale_ptr + r, mask=r < rank, other=0.0)
                a = load_elements(
                    a_ptr,
                    r[:, None].to(tl.int64),
                    k[None, :],
                    K,
                    (r < rank)[:, None] & inside[None, :],
                    code,
                )
                change += tl.sum(a * b[:, None], axis=0)
        y_ptrs = y_ptr + row * stride_ym + k
        y = tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32) + change
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


def embedding(
    y: torch.Tensor,
    ids: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    vocab: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Add every row's delta to the rows of an embedding.

    Semantics: ``y[m] += sum_p (scale_dp * S_dp)[ids[m]] + B_d[ids[m]] (lora_scale_d *
    A_d)``, accumulated in float32, rounded once.

    Args:
        y: [M, K] float. Mutated.
        ids: int [M].
        vocab: int32 [2]: 0 and the number of rows of the embedding.
        arena, table, rows, slots: see ops.py.
    """
    check_rows(y=y)
    m, k = y.shape
    _embedding_kernel[(m, triton.cdiv(k, layout.BLOCK))](
        y_ptr=y,
        ids_ptr=ids,
        arena_ptr=arena,
        table_ptr=table,
        vocab_ptr=vocab,
        rows_ptr=rows,
        slots_ptr=slots,
        K=k,
        words_per_row=layout.words_per_row(k),
        stride_ym=y.stride(0),
        stride_ts=table.stride(0),
        BLOCK_R=32,
        num_warps=4,
    )


@triton.jit
def _norm_kernel(
    y_ptr,
    x_ptr,
    arena_ptr,
    table_ptr,
    rows_ptr,
    slots_ptr,
    K,
    stride_ym,
    stride_yg,
    stride_xm,
    stride_xg,
    stride_ts,
    eps,
    CENTRED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64)
    if row >= 0:
        slot = tl.load(slots_ptr + tl.program_id(0)).to(tl.int64)
        entry_ptr = table_ptr + slot * stride_ts
        if tl.load(entry_ptr + WEIGHT) != ABSENT:
            group = tl.program_id(1)
            k = tl.arange(0, BLOCK_K)
            inside = k < K
            x_ptrs = x_ptr + row * stride_xm + group * stride_xg + k
            x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
            if CENTRED:
                x = tl.where(inside, x - tl.sum(x, axis=0) / K, 0.0)
            weight_ptr = arena_pointer(arena_ptr, entry_ptr, WEIGHT, tl.float32)
            weight = tl.load(weight_ptr + k, mask=inside, other=0.0)
            y = x * tl.rsqrt(tl.sum(x * x, axis=0) / K + eps) * weight
            if tl.load(entry_ptr + BIAS) != ABSENT:
                bias_ptr = arena_pointer(arena_ptr, entry_ptr, BIAS, tl.float32)
                y += tl.load(bias_ptr + k, mask=inside, other=0.0)
            y_ptrs = y_ptr + row * stride_ym + group * stride_yg + k
            tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


def norm(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    eps: float,
    centred: bool,
) -> None:
    """Redo a norm with the weight and the bias of every row's delta.

    Semantics: ``y[m, g] = z / sqrt(mean(z^2) + eps) * weight_d + bias_d`` in float32,
    where z is ``x[m, g]``, less its mean if ``centred``. Rows whose delta has no
    weight for this norm are unchanged.

    Args:
        y: [M, K] or [M, G, K] float. Mutated.
        x: like y; either may be a slice of a wider tensor.
        arena, table, rows, slots: see ops.py.
        eps: added to the mean square.
        centred: whether it is a layer norm.
    """
    check_rows(y=y, x=x)
    if y.dim() == 2:
        y, x = y.unsqueeze(1), x.unsqueeze(1)
    m, groups, k = y.shape
    _norm_kernel[(m, groups)](
        y_ptr=y,
        x_ptr=x,
        arena_ptr=arena,
        table_ptr=table,
        rows_ptr=rows,
        slots_ptr=slots,
        K=k,
        stride_ym=y.stride(0),
        stride_yg=y.stride(1),
        stride_xm=x.stride(0),
        stride_xg=x.stride(1),
        stride_ts=table.stride(0),
        eps=eps,
        CENTRED=centred,
        BLOCK_K=triton.next_power_of_2(k),
        num_warps=4 if k > 256 else 1,
    )
