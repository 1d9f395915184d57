# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The first half of a low-rank product: ``scratch[m] = lora_scale * (A x[m])``.

Also what every grouped kernel needs: a *row tile* is up to BLOCK_M rows of one
slot. Programs share the work of a launch, (row tile, output tile) pairs, by stride:
its amount is only known on the device, so the grid is sized for the device and not
for the work, and a captured graph fits every later step. Which program does a pair
does not change the result, and no pair reads what another one wrote.
"""

import torch
import triton
import triton.language as tl

from dqrelo_kernels import layout
from dqrelo_kernels import table as t
from dqrelo_kernels.gpu.tiles import are_tall

ABSENT = tl.constexpr(t.ABSENT)
SIGNS = tl.constexpr(int(t.Field.SIGNS))
PLANES = tl.constexpr(int(t.Field.PLANES))
SCALE = tl.constexpr(int(t.Field.SCALE))
LORA_A = tl.constexpr(int(t.Field.LORA_A))
LORA_B = tl.constexpr(int(t.Field.LORA_B))
LORA_SCALE = tl.constexpr(int(t.Field.LORA_SCALE))
RANK_A = tl.constexpr(int(t.Field.RANK_A))
RANK_B = tl.constexpr(int(t.Field.RANK_B))
FIRST_A = tl.constexpr(int(t.Field.FIRST_A))
FIRST_B = tl.constexpr(int(t.Field.FIRST_B))
FACTOR_DTYPE = tl.constexpr(int(t.Field.FACTOR_DTYPE))
BIAS = tl.constexpr(int(t.Field.BIAS))
FIELDS = tl.constexpr(len(t.Field))
WEIGHT = tl.constexpr(int(t.Field.WEIGHT))
ALIGNMENT = tl.constexpr(t.ALIGNMENT)
FLOAT32 = tl.constexpr(t.FACTOR_DTYPES.index(torch.float32))
BFLOAT16 = tl.constexpr(t.FACTOR_DTYPES.index(torch.bfloat16))
INT8 = tl.constexpr(t.FACTOR_DTYPES.index(torch.int8))
INT4 = tl.constexpr(t.FACTOR_DTYPES.index(t.INT4))
INT4_BLOCK = tl.constexpr(layout.INT4_BLOCK)
INT4_BYTES = tl.constexpr(layout.INT4_BLOCK // 2)  # of a full block

# As many as an SM can hold at a time at the registers that the kernels take.
PROGRAMS_PER_SM = 8


@triton.jit
def arena_pointer(arena_ptr, entry_ptr, FIELD: tl.constexpr, dtype: tl.constexpr):
    """Where the tensor that a table row names in ``FIELD`` starts."""
    offset = tl.multiple_of(tl.load(entry_ptr + FIELD), ALIGNMENT)
    return (arena_ptr + offset).to(tl.pointer_type(dtype))


@triton.jit
def load_factor(pointer, start, offsets, mask, code):
    """Elements of a factor, int4 aside, as float32; 0 where masked."""
    if code == FLOAT32:
        wide = pointer.to(tl.pointer_type(tl.float32)) + start
        value = tl.load(wide + offsets, mask=mask, other=0.0)
    elif code == INT8:
        narrow = pointer.to(tl.pointer_type(tl.int8)) + start
        value = tl.load(narrow + offsets, mask=mask, other=0).to(tl.float32)
    else:
        bits = tl.load(pointer + start + offsets, mask=mask, other=0)
        bfloat = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        half = bits.to(tl.float16, bitcast=True).to(tl.float32)
        value = tl.where(code == BFLOAT16, bfloat, half)
    return value


@triton.jit
def decode_int4(pairs, HALF: tl.constexpr, dtype: tl.constexpr, IN_FOURS: tl.constexpr):
    """The lower (0) or upper (1) integers of the bytes ``pairs`` as ``dtype``, exactly.

    In fours: four bytes of a register at a time. A nibble becomes the last bits of
    128 (bfloat16) or 1024 (float16), whose last bit is worth 1; that is subtracted
    again together with the 8.
    """
    if IN_FOURS:
        one: tl.constexpr = 0x3F803F80 if dtype == tl.bfloat16 else 0x3C003C00
        unit: tl.constexpr = 0x43434343 if dtype == tl.bfloat16 else 0x64646464
        less: tl.constexpr = 0xC308C308 if dtype == tl.bfloat16 else 0xE408E408
        kind: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
        bits = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t, one, less; shr.b32 t, $2, {4 * HALF};"
            f" and.b32 t, t, 0x0F0F0F0F; mov.b32 one, {one}; mov.b32 less, {less};"
            f" prmt.b32 $0, t, {unit}, 0x4140; fma.rn.{kind} $0, $0, one, less;"
            f" prmt.b32 $1, t, {unit}, 0x4342; fma.rn.{kind} $1, $1, one, less; }}",
            "=r,=r,r",
            [pairs],
            dtype=tl.int16,
            is_pure=True,
            pack=4,
        )
        values = bits.to(dtype, bitcast=True)
    else:
        values = (((pairs >> 4 * HALF) & 15).to(tl.int32) - 8).to(dtype)
    return values


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
    Products of integer or 16-bit factors and 16-bit activations are exact; float32
    factors meet these as TF32.

    Args:
        scratch: float32 [>= M, ranks], see ops.py. Mutated where a rank exists.
        x: [M, K] float.
        arena, table, rows, starts: see ops.py.
    """
    (m, k), (slots, slices, _) = x.shape, table.shape
    tall = are_tall(m, slots) and x.dtype != torch.float32
    block_m, stages = (64, 3) if tall else (16, 4)
    # The same for all heights, so that a row's bits do not depend on the height: an
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
        num_warps=2,  # of tall tiles each decodes all of A: no more of them
        num_stages=stages,
    )
