# SPDX-License-Identifier: Apache-2.0
"""The public API: ``torch.ops.dqrelo.*``, which add deltas to a base's results.

Arguments shared by all ops:

    arena       uint8 [bytes]: the tensors of all resident deltas
    table       int64 [slots, slices, Field]: where they lie (table.py)
    rows        int32 [capacity]: row numbers grouped by slot, -1 behind (rows.py)
    slots       int32 [capacity]: the slot of each of them, -1 behind
    starts      int32 [slots + 1]: where the group of each slot starts in ``rows``
    num_active  int32 [1] on the CPU: distinct slots in this step
    unmerged    int32 [capacity]: the rows of no merged slot, -1 behind
    merged      int32 [at most, 3] on the CPU: slot, start and end in ``rows``; or -1

Everything else is on the device of the activations. No op waits for the device,
takes anything but tensors that differs between layers, or touches a row that
belongs to no delta; with ``num_active`` 0 an op does nothing at all.
"""

from collections.abc import Callable
from typing import Any

import torch

from dqrelo_kernels import reference
from dqrelo_kernels.cpu import build as cpu
from dqrelo_kernels.rows import BASE

_library = torch.library.Library("dqrelo", "DEF")


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
    if not int(num_active):
        return
    backend = _backend(y)
    if backend == "triton":
        from dqrelo_kernels.gpu.low_rank import low_rank  # imports Triton
        from dqrelo_kernels.gpu.sign_matmul import sign_matmul

        low_rank(scratch, x, arena, table, rows, starts)
        sign_matmul(y, scratch, x, arena, table, slices, rows, starts)
    elif backend == "native":
        torch.ops.dqrelo.delta_linear_(  # the native one: from now on at once
            y, scratch, x, arena, table, slices, rows, slots, starts, num_active
        )
    else:
        some = slice(int(starts[-1]))  # what is behind belongs to merged slots
        reference.delta_linear_(
            y, scratch, x, arena, table, slices, rows[some], slots[some]
        )


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
    if not int(num_active):
        return
    backend = _backend(x)
    if backend == "triton":
        from dqrelo_kernels.gpu.low_rank import low_rank  # imports Triton

        low_rank(scratch, x, arena, table, rows, starts)
    elif backend == "native":
        torch.ops.dqrelo.delta_shrink_(
            scratch, x, arena, table, rows, slots, starts, num_active
        )
    else:
        some = slice(int(starts[-1]))
        reference.delta_shrink_(scratch, x, arena, table, rows[some], slots[some])


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
    if not int(num_active):
        return
    backend = _backend(y)
    if backend == "triton":
        from dqrelo_kernels.gpu.sign_matmul import sign_matmul  # imports Triton

        sign_matmul(y, scratch, x, arena, table, slices, rows, starts)
    elif backend == "native":
        torch.ops.dqrelo.delta_expand_(
            y, scratch, x, arena, table, slices, rows, slots, starts, num_active
        )
    else:
        some = slice(int(starts[-1]))
        reference.delta_expand_(
            y, scratch, x, arena, table, slices, rows[some], slots[some]
        )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scratch: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    slices: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    num_active: torch.Tensor,
    unmerged: torch.Tensor,
    merged: torch.Tensor,
) -> torch.Tensor:
    """A linear layer of which the op may read the weight, with every row's delta.

    Semantics: ``x W^T + bias``, then ``delta_linear_``; for the rows of a merged slot
    ``x (W + delta)^T + bias`` with a matrix that is made in this call and rounded to
    the dtype of W, as an exported fine-tune's is.

    Args:
        x: [M, K] float.
        weight: [N, K] of the same dtype.
        bias: [N], or None.
        scratch: see ``delta_linear_``. Mutated.

    Returns:
        [M, N] of the dtype of ``x``.
    """
    groups = [group for group in merged.tolist() if group[0] != BASE]
    if not groups:
        y = torch.nn.functional.linear(x, weight, bias)
    else:
        y = x.new_empty(len(x), len(weight))
        others = unmerged[: len(x) - sum(end - start for _, start, end in groups)]
        y[others] = torch.nn.functional.linear(x[others], weight, bias)
        for slot, start, end in groups:
            mine = rows[start:end]
            whole = _merge(weight, bias, arena, table, slices, slot)
            y[mine] = torch.nn.functional.linear(x[mine], *whole)
    delta_linear_(y, scratch, x, arena, table, slices, rows, slots, starts, num_active)
    return y


def _merge(weight: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if _backend(weight) == "triton":
        from dqrelo_kernels.gpu.merge import merge  # imports Triton

        return merge(weight, *arguments)
    return reference.merge(weight, *arguments)


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
    if cpu.library():
        torch.ops.dqrelo.expert_linear_(y, x, weight, ends, in_pairs)
    else:
        reference.expert_linear_(y, x, weight, ends, in_pairs)


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
    if not int(num_active):
        return
    backend = _backend(y)
    if backend == "triton":
        from dqrelo_kernels.gpu.rowwise import embedding  # imports Triton

        embedding(y, ids, arena, table, vocab, rows, slots)
    elif backend == "native":
        torch.ops.dqrelo.delta_embedding_(
            y, ids, arena, table, vocab, rows, slots, num_active
        )
    else:
        reference.delta_embedding_(y, ids, arena, table, vocab, rows, slots)


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
    if not int(num_active):
        return
    backend = _backend(y)
    if backend == "triton":
        from dqrelo_kernels.gpu.rowwise import norm  # imports Triton

        norm(y, x, arena, table, rows, slots, eps, centred)
    elif backend == "native":
        torch.ops.dqrelo.delta_norm_(
            y, x, arena, table, rows, slots, num_active, eps, centred
        )
    else:
        reference.delta_norm_(y, x, arena, table, rows, slots, eps, centred)


def _backend(x: torch.Tensor) -> str:
    """What computes an op on ``x``: "triton", "native" or, everywhere, "torch"."""
    if x.is_cuda:
        return "triton"
    return "native" if x.is_cpu and cpu.library() else "torch"


def prepare(device: torch.device) -> None:
    """Do now what the first call on ``device`` would wait for: build native code."""
    if device.type == "cpu":
        cpu.library()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The fake of an op that only changes its arguments."""


def register(
    op: Callable[..., Any], *mutated: str, fake: Callable[..., Any] = _nothing
) -> None:
    """Make ``op`` torch.ops.dqrelo's, for every device.

    Args:
        mutated: names of the arguments that it changes.
        fake: computes shapes and dtypes only; by default that of an op which returns
            nothing.
    """
    schema = torch.library.infer_schema(op, mutates_args=mutated)
    _library.define(f"{op.__name__}{schema}")
    _library.impl(op.__name__, op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dqrelo::{op.__name__}", fake, lib=_library)


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    return x.new_empty(len(x), len(weight))


register(delta_linear_, "y", "scratch")
register(delta_shrink_, "scratch")
register(delta_expand_, "y")
register(linear, "scratch", fake=_linear_fake)
register(expert_linear_, "y")
register(delta_embedding_, "y")
register(delta_norm_, "y")
