# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqrelo_kernels.layout import (
    int4_padding_is_clear,
    pack_int4,
    pack_signs,
    padding_is_clear,
    row_by_row,
    side_by_side,
    unpack_int4,
    unpack_signs,
    words_per_row,
)

COLUMNS = [1, 5, 15, 16, 17, 64, 96, 240, 255, 256, 257, 272, 300, 576, 1000]


def position(k: int, columns: int) -> tuple[int, int]:
    """(word, bit) of column k, written after docs/format.md and not after the code."""
    block, within = divmod(k, 256)
    width = -(-min(256, columns - 256 * block) // 16)
    return 16 * block + within % width, within // width


@pytest.mark.parametrize("columns", COLUMNS)
def test_every_bit_is_where_the_format_says(columns):
    generator = torch.Generator().manual_seed(columns)
    positive = torch.rand(3, columns, generator=generator) > 0.5
    words = pack_signs(positive)
    assert words.shape == (3, -(-columns // 16)) and words.dtype == torch.int16
    seen = torch.zeros_like(words, dtype=torch.int32)
    for k in range(columns):
        word, bit = position(k, columns)
        assert torch.equal((words[:, word].int() >> bit) & 1, positive[:, k].int())
        seen[:, word] |= 1 << bit
    assert not ((words.int() & 0xFFFF) & ~seen).any(), "padding bits are set"


def test_golden_words():
    columns = 40  # one block of width 3: bit j of word i is column 3 j + i
    positive = torch.zeros(2, columns, dtype=torch.bool)
    positive[0, [0, 1, 5, 39]] = True
    positive[1] = True
    # (column: word, bit) 0: 0, 0; 1: 1, 0; 5: 2, 1; 39: 0, 13
    assert pack_signs(positive).tolist() == [[0x2001, 1, 2], [0x3FFF, 0x1FFF, 0x1FFF]]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 700), st.integers(0, 2**31))
def test_round_trip(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    positive = torch.rand(rows, columns, generator=generator) > 0.5
    words = pack_signs(positive)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        signs = unpack_signs(words, columns, dtype)
        assert signs.dtype == dtype
        assert torch.equal(signs.float(), torch.where(positive, 1.0, -1.0))


@pytest.mark.parametrize("columns", COLUMNS)
def test_padding_bits_are_noticed(columns):
    words = pack_signs(torch.zeros(2, columns, dtype=torch.bool))
    assert padding_is_clear(words, columns)
    used = {position(k, columns) for k in range(columns)}
    spare = {(w, b) for w in range(words_per_row(columns)) for b in range(16)} - used
    for word, bit in spare:
        dirty = words.clone()
        dirty[1, word] = dirty[1, word].int() | (1 << bit) - (bit == 15) * 2**16
        assert not padding_is_clear(dirty, columns), (word, bit)
    full = pack_signs(torch.ones(2, columns, dtype=torch.bool))
    assert padding_is_clear(full, columns)


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(0, 200), st.integers(0, 99))
def test_int4_round_trip(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
    packed = pack_int4(values)
    assert packed.shape == (rows, -(-columns // 2)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_int4(packed, columns), values)
    assert int4_padding_is_clear(packed, columns)
    if columns % 2 and rows:
        packed[0, -1] |= 0x10
        assert not int4_padding_is_clear(packed, columns)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 48])
@pytest.mark.parametrize("size", [1, 3, 4, 6, 27, 72])
def test_rows_side_by_side(rows, size):
    """Byte by byte, written after the docstring of the module."""
    packed = torch.arange(rows * size).to(torch.uint8).view(rows, size)
    want, words = [], size // 4
    for first in range(0, rows, 16):
        run = packed[first : first + 16].tolist()
        for word in range(words):
            for row in run:
                want += row[4 * word : 4 * word + 4]
        for row in run:
            want += row[4 * words :]
    got = side_by_side(packed)
    assert got.tolist() == want
    assert torch.equal(row_by_row(got, rows), packed)
