# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""What the kernels share: the table's fields, factors, and how programs share work.

A *row tile* is up to BLOCK_M rows of one slot. The programs of a launch take the
(row tile, output tile) pairs by stride. Only the device knows the number of pairs. The
size of the grid depends on the device alone: a captured graph fits every later step.
Which program computes a pair does not change the result. A pair reads nothing that
another pair wrote.
"""

import torch
import triton
import triton.language as tl

from dqrelo_kernels import layout
from dqrelo_kernels import table as t

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
WORD_BITS = tl.constexpr(layout.WORD_BITS)
BLOCK = tl.constexpr(layout.BLOCK)

# The programs that an SM holds at a time with the registers that the kernels take.
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
def load_elements(pointer, row, column, columns, mask, code):
    """Elements of a factor of any dtype with ``columns`` columns, as float32."""
    if code == INT4:
        block = column // INT4_BLOCK
        within = column % INT4_BLOCK
        width = tl.minimum(tl.cdiv(columns - block * INT4_BLOCK, 2), INT4_BYTES)
        upper = within >= width
        byte = block * INT4_BYTES + within - tl.where(upper, width, 0)
        pairs_ptr = pointer.to(tl.pointer_type(tl.uint8)) + row * tl.cdiv(columns, 2)
        pairs = tl.load(pairs_ptr + byte, mask=mask, other=0)
        nibble = tl.where(upper, pairs >> 4, pairs & 15)
        value = tl.where(mask, nibble.to(tl.float32) - 8, 0.0)
    else:
        value = load_factor(pointer, 0, row * columns + column, mask, code)
    return value


@triton.jit
def decode_int4(pairs, HALF: tl.constexpr, dtype: tl.constexpr, IN_FOURS: tl.constexpr):
    """The lower (0) or upper (1) integers of the bytes ``pairs`` as ``dtype``, exactly.

    In fours: four bytes of a register at a time. A nibble becomes the last bits of
    128 (bfloat16) or 1024 (float16), whose last bit is worth 1. One operation
    subtracts this number and the 8.
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


@triton.jit
def slice_of(tile, entry_ptr, slices_ptr, SLICES: tl.constexpr, BLOCK_N: tl.constexpr):
    """The slice of a tile of BLOCK_N output features, and the tile's place in it.

    Args:
        tile: counted through all slices of a site.
        entry_ptr: the slot's table row of the first slice.

    Returns:
        the tile's number within its slice, the table row of the slice, and the
        slice's first output feature and number of output features.
    """
    first = tl.load(slices_ptr)
    size = tl.load(slices_ptr + 1) - first
    for j in tl.static_range(1, SLICES):
        tiles = tl.cdiv(size, BLOCK_N)
        if tile >= tiles:
            tile -= tiles
            entry_ptr += FIELDS
            first = tl.load(slices_ptr + j)
            size = tl.load(slices_ptr + j + 1) - first
    return tile, entry_ptr, first, size


def check_rows(**tensors: torch.Tensor | None) -> None:
    """Refuse a tensor whose elements of a row do not lie side by side.

    The kernels take no stride of the last dimension.

    Raises:
        ValueError: with the name of the tensor.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} {list(tensor.shape)} has strides {tensor.stride()}, expected "
                "1 as the last one: call contiguous() before the op"
            )


def programs(items: int, device: torch.device) -> int:
    """Size of the grid for at most ``items`` pieces of work."""
    if device.type == "cpu":  # Triton's interpreter
        return min(items, 3)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return min(items, PROGRAMS_PER_SM * sms)
