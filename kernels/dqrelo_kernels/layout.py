# SPDX-License-Identifier: Apache-2.0
"""The order of bits in packed matrices, on disk and in memory.

Signs
-----
A row of K signs is cut into blocks of 256. A block of width k is stored in
w = ceil(k / 16) words of 16 bits, and

    bit j of word i  <->  column  block * 256 + j * w + i        (set: +1, clear: -1)

so the words of a full block hold its 16 bit planes: one 32-byte load gives, bit
by bit, the signs of 16 *consecutive* columns. A tensor core takes them as one
k = 16 operand and a vector unit as one mask, each word is loaded once, and the
activations are read in their natural order. Only the last block of a row may be
narrower. Columns at or beyond K are padding and must be clear.

Integers of four bits
---------------------
The same with other numbers: a row of K integers is cut into blocks of 64, a block of
width k takes w = ceil(k / 2) bytes, and

    nibble j of byte i  <->  column block * 64 + j * w + i        (value + 8)

where nibble 0 is the lower half of a byte. Padding must be clear.

Rows in memory
--------------
On disk, and on a GPU, the packed rows of a matrix follow one another. On a CPU 16 rows
are the lanes of a vector register, and lie *side by side*: in runs of 16 rows, of which
the last one may have fewer, come the first four bytes of each row, then the next four
of each, and so on, and in the end what is left of each row, less than four bytes. These
are as many bytes as before.
"""

import torch

LANES = 16  # rows that lie side by side on a CPU
WORD_BITS = 16
BLOCK = 256


def words_per_row(columns: int) -> int:
    """Number of 16-bit words that hold one row of ``columns`` signs."""
    return -(-columns // WORD_BITS)


def _blocks(columns: int) -> list[tuple[int, int]]:
    """(first word, words) of the full blocks as one run, then of the narrower one."""
    full, rest = divmod(columns, BLOCK)
    runs = [(0, full * WORD_BITS)] if full else []
    return runs + ([(full * WORD_BITS, words_per_row(rest))] if rest else [])


def pack_signs(positive: torch.Tensor) -> torch.Tensor:
    """Pack a matrix of signs.

    Semantics: ``out[n, word(k)]`` has ``bit(k)`` set iff ``positive[n, k]``.

    Args:
        positive: [N, K] bool, any device; True stands for +1, False for -1.

    Returns:
        [N, ceil(K / 16)] int16 on the same device.
    """
    rows, columns = positive.shape
    out = torch.empty(
        rows, words_per_row(columns), dtype=torch.int16, device=positive.device
    )
    for first, words in _blocks(columns):
        width = min(words, WORD_BITS)
        bits = positive[:, first * WORD_BITS : (first + words) * WORD_BITS]
        missing = words * WORD_BITS - bits.shape[1]
        if missing:
            bits = torch.nn.functional.pad(bits, (0, missing))
        planes = bits.reshape(rows, words // width, WORD_BITS, width)
        packed = torch.zeros_like(planes[:, :, 0], dtype=torch.int32)
        for bit in range(WORD_BITS):
            packed |= planes[:, :, bit].int() << bit
        out[:, first : first + words] = packed.reshape(rows, words).to(torch.int16)
    return out


def unpack_signs(words: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Unpack what :func:`pack_signs` packed.

    Semantics: ``out[n, k] = +1 if bit(k) of words[n, word(k)] else -1``.

    Args:
        words: [N, ceil(columns / 16)] int16, any device.
        columns: K, the number of signs in a row.
        dtype: floating dtype of the result.

    Returns:
        [N, columns] of ``dtype`` on the same device, every element +1 or -1.
    """
    rows = words.shape[0]
    shifts = torch.arange(WORD_BITS - 1, -1, -1, dtype=torch.int16, device=words.device)
    parts = []
    for first, count in _blocks(columns):
        width = min(count, WORD_BITS)
        run = words[:, first : first + count].reshape(rows, count // width, 1, width)
        # Bit j moves to the sign bit of a bfloat16 whose other bits spell 1.0.
        ones = ((run << shifts[:, None]) & -0x8000) ^ -0x4080
        parts.append(ones.view(torch.bfloat16).reshape(rows, count * WORD_BITS))
    signs = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return signs[:, :columns].to(dtype)


def take_signs(words: torch.Tensor, columns: int, taken: torch.Tensor) -> torch.Tensor:
    """Some columns of what :func:`pack_signs` packed, packed again.

    Args:
        words: [N, ceil(columns / 16)] int16.
        columns: K, the number of signs in a row.
        taken: int64 [k], columns in ascending order.

    Returns:
        [N, ceil(k / 16)] int16, a copy.
    """
    if run := _whole_blocks(taken, columns, BLOCK):
        first, last = run
        return words[:, first // WORD_BITS : words_per_row(last)].clone()
    return pack_signs(unpack_signs(words, columns, torch.bfloat16)[:, taken] > 0)


def _whole_blocks(
    taken: torch.Tensor, columns: int, block: int
) -> tuple[int, int] | None:
    """First and end of ``taken`` when they are a run of whole blocks, else None."""
    first, last = int(taken[0]), int(taken[-1]) + 1
    run = last - first == len(taken) and first % block == 0
    return (first, last) if run and (last % block == 0 or last == columns) else None


def padding_is_clear(words: torch.Tensor, columns: int) -> bool:
    """Whether the bits of ``words`` that stand for no column are all clear."""
    last = columns % BLOCK
    if not last or last % WORD_BITS == 0:
        return True
    width = words_per_row(last)
    columns_of_bits = torch.arange(WORD_BITS)[:, None] * width + torch.arange(width)
    weights = 1 << torch.arange(WORD_BITS)[:, None]
    mask = ((columns_of_bits >= last) * weights).sum(dim=0).to(torch.int16)
    return not bool((words[:, -width:] & mask.to(words.device)).any())


INT4_BLOCK = 64


def int4_bytes(columns: int) -> int:
    """Number of bytes that hold one row of ``columns`` integers of four bits."""
    return -(-columns // 2)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack integers from -8 to 7.

    Args:
        values: [N, K] int8, any device.

    Returns:
        [N, ceil(K / 2)] uint8 on the same device.
    """
    rows, columns = values.shape
    nibbles = (values + 8).to(torch.uint8)
    parts = []
    for first, width in _int4_blocks(columns):
        part = nibbles[:, first : first + width]
        half = int4_bytes(min(width, INT4_BLOCK))
        part = torch.nn.functional.pad(part, (0, width % 2))
        pairs = part.reshape(rows, part.shape[1] // (2 * half), 2, half)
        parts.append((pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1))
    return torch.cat(parts, dim=1) if parts else nibbles


def unpack_int4(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack_int4`: int8 [N, columns]."""
    rows, parts = packed.shape[0], []
    for first, width in _int4_blocks(columns):
        half = int4_bytes(min(width, INT4_BLOCK))
        part = packed[:, first // 2 : first // 2 + int4_bytes(width)]
        pairs = part.reshape(rows, part.shape[1] // half, 1, half)
        both = torch.cat((pairs & 15, pairs >> 4), dim=2)
        parts.append(both.flatten(1)[:, :width])
    values = torch.cat(parts, dim=1) if parts else packed[:, :0]
    return values.to(torch.int8) - 8


def take_int4(packed: torch.Tensor, columns: int, taken: torch.Tensor) -> torch.Tensor:
    """The same as :func:`take_signs` for integers of four bits."""
    if run := _whole_blocks(taken, columns, INT4_BLOCK):
        first, last = run
        return packed[:, first // 2 : int4_bytes(last)].clone()
    return pack_int4(unpack_int4(packed, columns)[:, taken])


def int4_padding_is_clear(packed: torch.Tensor, columns: int) -> bool:
    """Whether the nibble of ``packed`` that stands for no column, if any, is clear."""
    return columns % 2 == 0 or not bool((packed[:, -1] >> 4).any())


def _int4_blocks(columns: int) -> list[tuple[int, int]]:
    """(first column, columns) of the full blocks as one run, then of the narrower."""
    rest = columns % INT4_BLOCK
    runs = [(0, columns - rest), (columns - rest, rest)]
    return [(first, width) for first, width in runs if width]


def side_by_side(packed: torch.Tensor) -> torch.Tensor:
    """Put the rows of a matrix side by side.

    Args:
        packed: [N, any] of any dtype.

    Returns:
        uint8 [bytes of ``packed``].
    """
    parts, data = [], packed.contiguous().view(torch.uint8)
    for run in _runs(data):
        words, rest = run.tensor_split([data.shape[1] // 4 * 4], dim=2)
        words = words.reshape(-1).view(torch.int32).view(*run.shape[:2], -1)
        words = words.transpose(1, 2).flatten(1).view(torch.uint8)
        parts.append(torch.cat((words, rest.flatten(1)), dim=1).flatten())
    return torch.cat(parts)


def row_by_row(data: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of :func:`side_by_side`: uint8 [rows, bytes of a row]."""
    parts, data = [], data.view(rows, -1)
    for run in _runs(data):
        height, bytes_of_words = run.shape[1], data.shape[1] // 4 * 4
        words, rest = run.flatten(1).tensor_split([bytes_of_words * height], dim=1)
        words = words.unflatten(1, (-1, height, 4)).transpose(1, 2).flatten(2)
        rest = rest.unflatten(1, (height, -1))
        parts.append(torch.cat((words, rest), dim=2).flatten(0, 1))
    return torch.cat(parts)


def _runs(data: torch.Tensor) -> list[torch.Tensor]:
    """[runs, rows, bytes] of the runs of 16 rows, then of the shorter one, if any."""
    whole = len(data) // LANES * LANES
    runs = [data[:whole].unflatten(0, (-1, LANES)), data[whole:].unsqueeze(0)]
    return [run for run in runs if run.shape[0] * run.shape[1]]


def unpack_experts(weight: torch.Tensor, in_pairs: bool) -> torch.Tensor:
    """The matrices that vLLM packed for its kernel on the CPU.

    Semantics: the bytes of ``weight`` are ``packed[e, n // 16, k, n % 16]``, or, in
    pairs of columns, ``packed[e, n // 16, k // 2, n % 16, k % 2]``; vLLM's source is
    csrc/cpu/cpu_fused_moe.cpp.

    Args:
        weight: [experts, N, K] of any dtype, N a multiple of 16.

    Returns:
        [experts, N, K], a copy.
    """
    count, rows, columns = weight.shape
    width = 2 if in_pairs else 1
    tiles = weight.reshape(count, rows // LANES, columns // width, LANES, width)
    return tiles.transpose(2, 3).reshape(weight.shape)
