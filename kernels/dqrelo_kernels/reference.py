# SPDX-License-Identifier: Apache-2.0
"""What each op computes, in plain fp32 torch. This is the specification.

``ops`` makes these functions ops, and describes the arguments that all of them share;
``table`` says what a table row means. M rows, N output features, K input features, R
rank.
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
    rows: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """(slot, its row numbers) for each slot that has rows, in slot order.

    With ``starts``, merged slots are left out.
    """
    count = int((slots >= 0).sum() if starts is None else starts[-1])
    rows, slots = rows[:count], slots[:count]
    for slot in slots.unique().tolist():
        yield slot, rows[slots == slot].long()


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
    starts: torch.Tensor,
    num_active: torch.Tensor,
) -> None:
    """Add every row's delta to the output of a linear layer.

    Semantics, for row m with delta d, in slice j of the output features:
    ``y[m, j] += sum_p scale_djp * (S_djp x[m]) + B_dj (lora_scale_dj * (A_dj x[m]))
    + bias_dj`` over the sign planes p, accumulated in float32, rounded once. With one
    plane and no lora_scale it is equation 15 of arXiv 2604.16940.

    Args:
        y: [M, N] float, the base's output. Mutated.
        scratch: float32 [>= M, ranks], ranks at least the sum of the ranks of the
            slices of any slot. Mutated: holds A x between two kernels.
        x: [M, K] float, the layer's input.
        slices: int32 [slices + 1]: first output feature of each slice, then N.
    """
    step = (rows, slots, starts, num_active)
    delta_shrink_(scratch, x, arena, table, *step)
    delta_expand_(y, scratch, x, arena, table, slices, *step)


def delta_shrink_(
    scratch: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    num_active: torch.Tensor,
) -> None:
    """The first half of ``delta_linear_``, of workers that share the matrices of A.

    Semantics: ``scratch[m, first_dj + r] = lora_scale_dj[r] * (A_dj[r] . x[m])`` for
    the rows r of A that this worker has, in slice j; other columns keep what they hold.

    Args:
        scratch: see ``delta_linear_``. Mutated.
        x: [M, K] float, the layer's input.
    """
    for slot, group in groups(rows, slots, starts):
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
    starts: torch.Tensor,
    num_active: torch.Tensor,
) -> None:
    """The second half of ``delta_linear_``, with A x of all workers in scratch.

    Semantics: ``y[m, j] += sum_p scale_djp * (S_djp x[m]) + B_dj scratch[m, first_dj:]
    + bias_dj`` with the columns of B that this worker has, otherwise as there.
    """
    k, ends = x.shape[1], slices.tolist()
    for slot, group in groups(rows, slots, starts):
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


def merge_(
    merged: torch.Tensor,
    merged_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arena: torch.Tensor,
    table: torch.Tensor,
    slices: torch.Tensor,
    slot: int,
) -> None:
    """Make the matrix and the bias of a linear layer with the delta of one slot.

    Semantics: ``merged_j = weight_j + sum_p scale_djp * S_djp + B_dj (lora_scale_dj *
    A_dj)`` and ``merged_bias_j = bias_j + bias_dj`` in slice j, summed in float32 and
    rounded once.

    Args:
        merged: [N, K] of the dtype of ``weight``, contiguous. Mutated.
        merged_bias: [N] of the same dtype. Mutated.
        weight: [N, K] float.
        bias: [N] of the same dtype; None stands for zeros.
    """
    k, ends = weight.shape[1], slices.tolist()
    for j, entry in enumerate(table[slot].tolist()):
        mine, size = slice(ends[j], ends[j + 1]), ends[j + 1] - ends[j]
        whole = weight[mine].to(torch.float32, copy=True)
        for scale, words in planes(arena, entry, size, k):
            whole += scale * unpack_signs(words, k, torch.float32)
        whole += lora_b(arena, entry, size).float() @ lora_a(arena, entry, k).float()
        merged[mine] = whole.to(merged.dtype)
        change = torch.zeros(size, device=weight.device)
        if bias is not None:
            change += bias[mine]
        if entry[Field.BIAS] != ABSENT:
            change += read(arena, entry[Field.BIAS], torch.float32, size)
        merged_bias[mine] = change.to(merged.dtype)


def expert_linear_(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    in_pairs: bool,
) -> None:
    """Multiply every row by the matrix of its expert, as vLLM packed it on the CPU.

    Semantics: ``y[m] = W_e x[m]`` for ``ends[e - 1] <= m < ends[e]``; accumulated in
    float32, rounded once. Where a step has no deltas vLLM's own kernel has the same
    bytes.

    Args:
        y: [M, N] float. Mutated.
        x: [M, K] float, rows in the order of their experts.
        weight: [experts, N, K] float, see ``layout.unpack_experts``; N and K are
            multiples of 32.
        ends: int32 [experts], the last one at most M.
        in_pairs: whether ``weight`` is packed in pairs of columns, of bfloat16.
    """
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
    num_active: torch.Tensor,
) -> None:
    """Add every row's delta to the rows of an embedding.

    Semantics: ``y[m] += sum_p (scale_dp * S_dp)[ids[m]] + B_d[ids[m]] (lora_scale_d *
    A_d)``, see ``delta_linear_``.

    Args:
        y: [M, K] float, the base's embeddings. Mutated.
        ids: int [M], token ids below the vocabulary size.
        vocab: int32 [2]: 0 and the number of rows N of the embedding.
    """
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
    num_active: torch.Tensor,
    eps: float,
    centred: bool,
) -> None:
    """Redo a norm with the weight and the bias of every row's delta.

    Semantics: ``y[m, g] = z / sqrt(mean(z^2) + eps) * weight_d + bias_d``, where z is
    ``x[m, g]`` for an RMS norm and ``x[m, g] - mean(x[m, g])`` for a layer norm; rows
    whose delta has no weight for this norm keep what the base computed.

    Args:
        y: [M, ..., K] float, the base's output. Mutated.
        x: [M, ..., K] float, what the base normalised (with the residual added).
        eps: the same for all norms of a model, as is the next.
        centred: whether they are layer norms.
    """
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
