# SPDX-License-Identifier: Apache-2.0
"""What each op computes, in plain fp32 torch. This is the specification.

M rows, N output features, K input features, R rank. The launch arguments are
described in ``ops``; ``table`` says what a table row means.
"""

from collections.abc import Iterator

import torch

from dqrelo_kernels.layout import (
    int4_bytes,
    unpack_experts,
    unpack_int4,
    unpack_signs,
    words_per_row,
)
from dqrelo_kernels.table import ABSENT, FACTOR_DTYPES, INT4, Field, read, read_matrices


def groups(
    rows: torch.Tensor, slots: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """(slot, its row numbers) for each slot that has rows, in slot order."""
    active = slots[slots >= 0]
    for slot in active.unique().tolist():
        yield slot, rows[: len(active)][active == slot].long()


def lora_a(arena: torch.Tensor, entry: list[int], k: int) -> torch.Tensor:
    """A [R, K] of a table row, as stored, or times its scale if it has one."""
    rank = max(entry[Field.RANK_A], 0)
    a = _factor(arena, entry, Field.LORA_A, rank, k)
    if rank and entry[Field.LORA_SCALE] != ABSENT:
        a = read(arena, entry[Field.LORA_SCALE], torch.float32, rank, 1) * a
    return a


def lora_b(arena: torch.Tensor, entry: list[int], n: int) -> torch.Tensor:
    """B [N, R] of a table row, as stored."""
    return _factor(arena, entry, Field.LORA_B, n, max(entry[Field.RANK_B], 0))


def _factor(
    arena: torch.Tensor, entry: list[int], field: Field, rows: int, columns: int
) -> torch.Tensor:
    if entry[field] == ABSENT:
        return torch.zeros(rows, columns, device=arena.device)
    dtype = FACTOR_DTYPES[entry[Field.FACTOR_DTYPE]]
    width = int4_bytes(columns) if dtype == INT4 else columns
    (factor,) = read_matrices(arena, entry, field, dtype, 1, rows, width)
    return unpack_int4(factor, columns) if dtype == INT4 else factor


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


def delta_linear_(
    y: torch.Tensor,
    scratch: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    slices: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """``y[m] += sum over planes of scale * (S x[m]) + B (lora_scale * (A x[m])) +
    bias`` of row m's delta, per slice."""
    delta_shrink_(scratch, x, arena, table, rows, slots)
    delta_expand_(y, scratch, x, arena, table, slices, rows, slots)


def delta_shrink_(
    scratch: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """``scratch[m, first:] = lora_scale * (A x[m])`` of row m's delta, per slice."""
    for slot, group in groups(rows, slots):
        for entry in table[slot].tolist():
            a = lora_a(arena, entry, x.shape[1]).float()
            columns = slice(entry[Field.FIRST_A], entry[Field.FIRST_A] + len(a))
            if len(a):
                scratch[group, columns] = x[group].float() @ a.T


def delta_expand_(
    y: torch.Tensor,
    scratch: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    slices: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """``y[m] += sum over planes of scale * (S x[m]) + B scratch[m, first:] + bias`` of
    row m's delta, per slice."""
    k, ends = x.shape[1], slices.tolist()
    for slot, group in groups(rows, slots):
        x_group = x[group].float()
        for j, entry in enumerate(table[slot].tolist()):
            mine, n = slice(ends[j], ends[j + 1]), ends[j + 1] - ends[j]
            out = y[group, mine].float()
            for scale, words in planes(arena, entry, n, k):
                out += scale.T * (x_group @ unpack_signs(words, k, torch.float32).T)
            b = lora_b(arena, entry, n).float()
            if b.shape[1]:
                first = entry[Field.FIRST_B]
                out += scratch[group, first : first + b.shape[1]] @ b.T
            if entry[Field.BIAS] != ABSENT:
                out += read(arena, entry[Field.BIAS], torch.float32, n)
            y[group, mine] = out.to(y.dtype)


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
        a, b = lora_a(arena, entry, k), lora_b(arena, entry, size)
        merged[mine] += b.float() @ a.float()
        if entry[Field.BIAS] != ABSENT:
            merged_bias[mine] += read(arena, entry[Field.BIAS], torch.float32, size)
    return merged.to(weight.dtype), merged_bias.to(weight.dtype)


def expert_linear_(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    in_pairs: bool,
) -> None:
    """``y[m] = W_e x[m]`` for the rows m of expert e."""
    last = ends.tolist()
    for e, (start, end) in enumerate(zip([0, *last], last, strict=False)):
        if start < end:
            (matrix,) = unpack_experts(weight[e : e + 1], in_pairs)
            y[start:end] = (x[start:end].float() @ matrix.float().T).to(y.dtype)


def delta_embedding_(
    y: torch.Tensor,
    ids: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    vocab: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """``y[m]`` += row ids[m] of the matrix that ``delta_linear_`` multiplies by."""
    n, k = int(vocab[-1]), y.shape[1]
    for slot, group in groups(rows, slots):
        entry = table[slot, 0].tolist()
        token = ids[group].long()
        change = torch.zeros(len(group), k, dtype=torch.float32, device=y.device)
        for scale, words in planes(arena, entry, n, k):
            change += scale[token] * unpack_signs(words[token], k, torch.float32)
        a, b = lora_a(arena, entry, k), lora_b(arena, entry, n)
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
