# SPDX-License-Identifier: Apache-2.0
"""What each op computes, in plain fp32 torch. This is the specification.

M rows, N output features, K input features, R rank. The launch arguments are
described in ``ops``; ``table`` says what a table row means.
"""

from collections.abc import Iterator

import torch

from dqrelo_kernels.layout import int4_bytes, unpack_int4, unpack_signs, words_per_row
from dqrelo_kernels.table import ABSENT, FACTOR_DTYPES, INT4, Field, read, read_matrices


def groups(
    rows: torch.Tensor, slots: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """(slot, its row numbers) for each slot that has rows, in slot order."""
    active = slots[slots >= 0]
    for slot in active.unique().tolist():
        yield slot, rows[: len(active)][active == slot].long()


def factors(
    arena: torch.Tensor, entry: list[int], n: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """B [N, R] and A [R, K] of a table row, as stored; A times its scale if any."""
    rank, dtype = entry[Field.RANK], FACTOR_DTYPES[entry[Field.FACTOR_DTYPE]]
    widths = (int4_bytes(rank), int4_bytes(k)) if dtype == INT4 else (rank, k)
    (b,) = read_matrices(arena, entry, Field.LORA_B, dtype, 1, n, widths[0])
    (a,) = read_matrices(arena, entry, Field.LORA_A, dtype, 1, rank, widths[1])
    if dtype == INT4:
        b, a = unpack_int4(b, rank), unpack_int4(a, k)
    if entry[Field.LORA_SCALE] != ABSENT:
        a = read(arena, entry[Field.LORA_SCALE], torch.float32, rank, 1) * a
    return b, a


def planes(
    arena: torch.Tensor, entry: list[int], n: int, k: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Scale [N, 1] and packed signs [N, ceil(K / 16)] of each sign plane."""
    if entry[Field.SIGNS] != ABSENT:
        count, words = entry[Field.PLANES], words_per_row(k)
        yield from zip(
            read(arena, entry[Field.SCALE], torch.float32, count, n, 1),
            read_matrices(arena, entry, Field.SIGNS, torch.int16, count, n, words),
            strict=True,
        )


def linear(
    x: torch.Tensor, arena: torch.Tensor, entry: list[int], n: int
) -> torch.Tensor:
    """One matrix of one delta, float32 [M, N].

    Semantics: ``sum over planes of scale * (S x) + B (lora_scale * (A x)) + bias``.
    """
    k = x.shape[1]
    out = torch.zeros(x.shape[0], n, dtype=torch.float32, device=x.device)
    for scale, words in planes(arena, entry, n, k):
        out += scale.T * (x @ unpack_signs(words, k, x.dtype).T).float()
    if entry[Field.RANK] != ABSENT:
        b, a = factors(arena, entry, n, k)
        out += ((x @ a.to(x.dtype).T) @ b.to(x.dtype).T).float()
    if entry[Field.BIAS] != ABSENT:
        out += read(arena, entry[Field.BIAS], torch.float32, n)
    return out


def delta_linear_(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    slices: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """``y[m] += linear(x[m])`` of row m's delta, per slice."""
    ends = slices.tolist()
    for slot, group in groups(rows, slots):
        x_group = x[group].float()
        for j, entry in enumerate(table[slot].tolist()):
            columns = slice(ends[j], ends[j + 1])
            change = linear(x_group, arena, entry, ends[j + 1] - ends[j])
            y[group, columns] = (y[group, columns].float() + change).to(y.dtype)


def merge(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arena: torch.Tensor,
    table: torch.Tensor,
    slices: torch.Tensor,
    slot: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight + sum of scale * S + B A`` and ``bias + change of bias``, per slice."""
    (n, k), ends = weight.shape, slices.tolist()
    merged = weight.to(torch.float32, copy=True)
    bias = weight.new_zeros(n) if bias is None else bias
    merged_bias = bias.to(torch.float32, copy=True)
    for j, entry in enumerate(table[slot].tolist()):
        mine, size = slice(ends[j], ends[j + 1]), ends[j + 1] - ends[j]
        for scale, words in planes(arena, entry, size, k):
            merged[mine] += scale * unpack_signs(words, k, torch.float32)
        if entry[Field.RANK] != ABSENT:
            b, a = factors(arena, entry, size, k)
            merged[mine] += b.float() @ a.float()
        if entry[Field.BIAS] != ABSENT:
            merged_bias[mine] += read(arena, entry[Field.BIAS], torch.float32, size)
    return merged.to(weight.dtype), merged_bias.to(weight.dtype)


def delta_embedding_(
    y: torch.Tensor,
    ids: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    vocab: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """``y[m]`` += row ids[m] of the matrix that ``linear`` multiplies by."""
    n, k = int(vocab[-1]), y.shape[1]
    for slot, group in groups(rows, slots):
        entry = table[slot, 0].tolist()
        token = ids[group].long()
        change = torch.zeros(len(group), k, dtype=torch.float32, device=y.device)
        for scale, words in planes(arena, entry, n, k):
            change += scale[token] * unpack_signs(words[token], k, torch.float32)
        if entry[Field.RANK] != ABSENT:
            b, a = factors(arena, entry, n, k)
            change += b[token].float() @ a.float()
        y[group] = (y[group].float() + change).to(y.dtype)


def delta_norm_(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    eps: float,
    centred: bool,
) -> None:
    """``y[m] = x[m] / rms(x[m]) * weight + bias`` with those of row m's delta."""
    k = x.shape[-1]
    for slot, group in groups(rows, slots):
        entry = table[slot, 0].tolist()
        if entry[Field.WEIGHT] == ABSENT:
            continue
        x_group = x[group].float()
        if centred:
            x_group = x_group - x_group.mean(dim=-1, keepdim=True)
        variance = x_group.square().mean(dim=-1, keepdim=True)
        weight = read(arena, entry[Field.WEIGHT], torch.float32, k)
        normed = x_group * torch.rsqrt(variance + eps) * weight
        if entry[Field.BIAS] != ABSENT:
            normed += read(arena, entry[Field.BIAS], torch.float32, k)
        y[group] = normed.to(y.dtype)
