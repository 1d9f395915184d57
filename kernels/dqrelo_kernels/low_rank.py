# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The first half of a low-rank product: ``scratch[m] = A x[m]`` of row m's delta.

Also what every grouped kernel needs: a *row tile* is up to BLOCK_M rows of one
slot. Programs share the work of a launch, (row tile, output tile) pairs, by stride:
its amount is only known on the device, so the grid is sized for the device and not
for the work, and a captured graph fits every later step. Which program does a pair
does not change the result, and no pair reads what another one wrote.
"""

import torch
import triton
import triton.language as tl

from dqrelo_kernels import table as t

ABSENT = tl.constexpr(t.ABSENT)
SIGNS = tl.constexpr(int(t.Field.SIGNS))
SCALE = tl.constexpr(int(t.Field.SCALE))
LORA_A = tl.constexpr(int(t.Field.LORA_A))
LORA_B = tl.constexpr(int(t.Field.LORA_B))
RANK = tl.constexpr(int(t.Field.RANK))
FACTOR_DTYPE = tl.constexpr(int(t.Field.FACTOR_DTYPE))
BIAS = tl.constexpr(int(t.Field.BIAS))
FIELDS = tl.constexpr(len(t.Field))
WEIGHT = tl.constexpr(int(t.Field.WEIGHT))
ALIGNMENT = tl.constexpr(t.ALIGNMENT)
FLOAT32 = tl.constexpr(t.FACTOR_DTYPES.index(torch.float32))
BFLOAT16 = tl.constexpr(t.FACTOR_DTYPES.index(torch.bfloat16))

# As many as an SM can hold at a time at the registers that the kernels take.
PROGRAMS_PER_SM = 8
# From this many rows on a step is mostly prompts: many rows share a delta.
TALL = 257


@triton.jit
def arena_pointer(arena_ptr, entry_ptr, FIELD: tl.constexpr, dtype: tl.constexpr):
    """Where the tensor that a table row names in ``FIELD`` starts."""
    offset = tl.multiple_of(tl.load(entry_ptr + FIELD), ALIGNMENT)
    return (arena_ptr + offset).to(tl.pointer_type(dtype))


@triton.jit
def load_factor(pointer, start, offsets, mask, code):
    """Elements of a factor of any of FACTOR_DTYPES, as float32; 0 where masked."""
    if code == FLOAT32:
        wide = pointer.to(tl.pointer_type(tl.float32)) + start
        value = tl.load(wide + offsets, mask=mask, other=0.0)
    else:
        bits = tl.load(pointer + start + offsets, mask=mask, other=0)
        bfloat = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        half = bits.to(tl.float16, bitcast=True).to(tl.float32)
        value = tl.where(code == BFLOAT16, bfloat, half)
    return value


@triton.jit
def row_tiles(starts_ptr, slots, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """How many row tiles each slot has, int32 [BLOCK_S]."""
    s = tl.arange(0, BLOCK_S)
    start = tl.load(starts_ptr + s, mask=s < slots, other=0)
    end = tl.load(starts_ptr + s + 1, mask=s < slots, other=0)
    return tl.cdiv(end - start, BLOCK_M)


@triton.jit
def locate(ends, item):
    """The slot that ``item`` falls to, and the items of the slots before it.

    ``ends`` are the running totals of the slots' items.
    """
    before = ends <= item
    slot = tl.sum(before.to(tl.int32), axis=0)
    return slot, tl.max(tl.where(before, ends, 0), axis=0)


@triton.jit
def row_numbers(rows_ptr, starts_ptr, slot, tile, BLOCK_M: tl.constexpr):
    """Row numbers int64 [BLOCK_M] of a slot's row tile, and which of them exist."""
    m = tl.load(starts_ptr + slot) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = m < tl.load(starts_ptr + slot + 1)
    return tl.load(rows_ptr + m, mask=exists, other=0).to(tl.int64), exists


def programs(items: int, device: torch.device) -> int:
    """Size of the grid for at most ``items`` pieces of work."""
    if device.type == "cpu":  # Triton's interpreter
        return min(items, 3)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return min(items, PROGRAMS_PER_SM * sms)


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
    stride_sm,
    stride_xm,
    stride_ts,
    SLICES: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    s = tl.arange(0, BLOCK_S)
    rank_tiles = tl.zeros((BLOCK_S,), dtype=tl.int32)
    for j in tl.static_range(SLICES):
        field_ptr = table_ptr + s.to(tl.int64) * stride_ts + j * FIELDS + RANK
        ranks = tl.maximum(tl.load(field_ptr, mask=s < slots, other=0), 0)
        rank_tiles += tl.cdiv(ranks.to(tl.int32), BLOCK_R)
    ends = tl.cumsum(row_tiles(starts_ptr, slots, BLOCK_M, BLOCK_S) * rank_tiles)
    k = tl.arange(0, BLOCK_K)
    for item in range(tl.program_id(0), tl.max(ends, axis=0), tl.num_programs(0)):
        slot, before = locate(ends, item)
        count = tl.cdiv(
            tl.load(starts_ptr + slot + 1) - tl.load(starts_ptr + slot), BLOCK_M
        )
        row, exists = row_numbers(
            rows_ptr, starts_ptr, slot, (item - before) % count, BLOCK_M
        )

        # The slice of this rank tile, its first rank, and the ranks before the slice.
        tile = (item - before) // count
        entry_ptr = table_ptr + slot.to(tl.int64) * stride_ts
        first_r = tile * BLOCK_R
        rank = tl.maximum(tl.load(entry_ptr + RANK), 0).to(tl.int32)
        column = 0
        for _ in tl.static_range(SLICES - 1):
            if first_r >= rank:
                first_r -= tl.cdiv(rank, BLOCK_R) * BLOCK_R
                column += rank
                entry_ptr += FIELDS
                rank = tl.maximum(tl.load(entry_ptr + RANK), 0).to(tl.int32)

        r = first_r + tl.arange(0, BLOCK_R)
        code = tl.load(entry_ptr + FACTOR_DTYPE)
        a_ptr = arena_pointer(arena_ptr, entry_ptr, LORA_A, tl.int16)
        a_start = first_r.to(tl.int64) * K
        a_offsets = tl.arange(0, BLOCK_R)[:, None] * K + k[None, :]
        x_ptrs = x_ptr + row[None, :] * stride_xm + k[:, None]
        acc = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)
        if code == NATIVE:
            a_ptrs = (
                a_ptr.to(tl.pointer_type(x_ptr.dtype.element_ty)) + a_start + a_offsets
            )
            for first in range(0, K, BLOCK_K):
                inside = k < K - first
                a = tl.load(
                    a_ptrs + first,
                    mask=(r < rank)[:, None] & inside[None, :],
                    other=0.0,
                )
                x = tl.load(
                    x_ptrs + first, mask=inside[:, None] & exists[None, :], other=0.0
                )
                acc = tl.dot(a, x, acc, input_precision=PRECISION)
        else:
            for first in range(0, K, BLOCK_K):
                inside = k < K - first
                mask = (r < rank)[:, None] & inside[None, :]
                a = load_factor(a_ptr, a_start, a_offsets + first, mask, code)
                x = tl.load(
                    x_ptrs + first, mask=inside[:, None] & exists[None, :], other=0.0
                )
                acc = tl.dot(a, x.to(tl.float32), acc, input_precision=PRECISION)
        out_ptrs = scratch_ptr + row[None, :] * stride_sm + (column + r)[:, None]
        tl.store(out_ptrs, acc, mask=(r < rank)[:, None] & exists[None, :])


def low_rank(
    scratch: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """Multiply every row by the A of its delta, for all slices.

    Semantics: ``scratch[m, R_j + r] = A_dj[r] . x[m]``, where R_j is the sum of the
    ranks of the slices before j. Products of 16-bit factors and activations are
    exact; float32 factors meet 16-bit activations as TF32.

    Args:
        scratch: float32 [>= M, ranks], see ops.py. Mutated where a rank exists.
        x: [M, K] float.
        arena, table, rows, starts: see ops.py.
    """
    (m, k), (slots, slices, _) = x.shape, table.shape
    tall = m >= TALL and x.dtype != torch.float32
    block_m, block_r, block_k, warps = (64, 32, 128, 4) if tall else (16, 16, 256, 2)
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
        stride_sm=scratch.stride(0),
        stride_xm=x.stride(0),
        stride_ts=table.stride(0),
        SLICES=slices,
        NATIVE=t.FACTOR_DTYPES.index(x.dtype),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        BLOCK_S=triton.next_power_of_2(slots),
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=4,
    )
