# SPDX-License-Identifier: Apache-2.0
"""The public API: ``torch.ops.dqrelo.*``, which add deltas to a base's results.

``reference`` has each op but ``linear``: its own arguments, and what it computes.
torch's dispatcher calls the kernel in cpu/ops.cpp, the launcher in gpu/ops.py or, where
there is neither, the reference.

Arguments shared by all ops:

    arena       uint8 [bytes]: the tensors of all resident deltas
    table       int64 [slots, slices, Field]: where they lie (table.py)
    rows        int32 [capacity]: row numbers grouped by slot, padded with -1 (rows.py)
    slots       int32 [capacity]: the slot of each of them, padded with -1
    starts      int32 [slots + 1]: where the group of each slot starts in ``rows``
    num_active  int32 [1] on the CPU: distinct slots in this step
    unmerged    int32 [capacity]: the rows of no merged slot, padded with -1
    merged      int32 [at most, 3] on the CPU: slot, start and end in ``rows``; or -1

Everything else is on the device of the activations. No op waits for the device,
takes anything but tensors that differs between layers, or touches a row that
belongs to no delta; with ``num_active`` 0 an op changes nothing at all.
"""

import inspect
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch

from dqrelo_kernels import reference
from dqrelo_kernels.cpu import build as cpu
from dqrelo_kernels.rows import BASE
from dqrelo_kernels.table import aligned

# Rows that a step with merged slots multiplies at a time. vLLM's profiling of memory
# meets no such step, and would not count copies of all its rows.
PRODUCT_ROWS = 1024

Op = Callable[..., Any]

_library = torch.library.Library("dqrelo", "DEF")
_launchers: dict[str, Op] = {}  # by the name of their op


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    whole: torch.Tensor,
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
    ``x (W + delta)^T + bias`` with a matrix that is made in ``whole`` and rounded to
    the dtype of W, as an exported fine-tune's is.

    Args:
        x: [M, K] float.
        weight: [N, K] of the same dtype.
        bias: [N], or None.
        whole: uint8, at least ``whole_bytes(weight)`` where a slot is merged. Mutated.
        scratch: see ``delta_linear_``. Mutated.

    Returns:
        [M, N] of the dtype of ``x``.
    """
    groups = [group for group in merged.tolist() if group[0] != BASE]
    if not groups:
        y = torch.nn.functional.linear(x, weight, bias)
    else:
        made = _views(whole, weight)
        y = x.new_empty(len(x), len(weight))
        others = unmerged[: len(x) - sum(end - start for _, start, end in groups)]
        _product_(y, x, others, weight, bias)
        for slot, start, end in groups:
            torch.ops.dqrelo.merge_(*made, weight, bias, arena, table, slices, slot)
            _product_(y, x, rows[start:end], *made)
    torch.ops.dqrelo.delta_linear_(
        y, scratch, x, arena, table, slices, rows, slots, starts, num_active
    )
    return y


def _product_(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """``y[rows] = x[rows] W^T + bias``, PRODUCT_ROWS at a time."""
    for some in rows.split(PRODUCT_ROWS):
        y[some] = torch.nn.functional.linear(x[some], weight, bias)


def whole_bytes(weight: torch.Tensor) -> int:
    """Bytes that ``linear`` makes a merged matrix [N, K] and its bias [N] in."""
    return aligned(weight.nbytes) + len(weight) * weight.itemsize


def _views(
    whole: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of a matrix and a bias in ``whole``."""
    matrix = whole[: weight.nbytes].view(weight.dtype).view(weight.shape)
    bias = whole[aligned(weight.nbytes) : whole_bytes(weight)].view(weight.dtype)
    return matrix, bias


def prepare(device: torch.device) -> None:
    """Do now what the first call on ``device`` would wait for: build native code."""
    if device.type == "cpu":
        cpu.library()


def use_launchers(key: str, library: torch.library.Library) -> None:
    """Have Triton's launchers compute the ops that have one.

    Args:
        key: a dispatch key of torch: "CUDA"; or "CPU", in Triton's interpreter and with
            ``DQRELO_NATIVE=0``.
        library: of the namespace "dqrelo". The launchers are used while it lives.
    """
    for name, launcher in _launchers.items():
        library.impl(name, launcher, key)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The fake of an op that only changes its arguments."""


def register(
    op: Op,
    *mutated: str,
    fake: Op = _nothing,
    native: bool = False,
    triton: bool = False,
) -> None:
    """Make ``op`` torch.ops.dqrelo's; it computes where the op has no kernel.

    An op that only changes its arguments does nothing where ``num_active`` is 0.

    Args:
        mutated: names of the arguments that it changes.
        fake: computes shapes and dtypes only; by default the fake of an op that only
            changes its arguments.
        native: whether cpu/ops.cpp has the op. Its first call on a CPU builds that.
        triton: whether gpu/ops.py has a launcher, of all arguments but ``num_active``.
    """
    name, names = op.__name__, list(inspect.signature(op).parameters)
    others = itemgetter(*(i for i, n in enumerate(names) if n != "num_active"))

    def guarded(kernel: Op) -> Op:
        if fake is not _nothing or "num_active" not in names:
            return kernel
        active = names.index("num_active")

        def run(*args: Any) -> None:
            if int(args[active]):
                kernel(*args)

        return run

    def compute(*args: Any) -> Any:
        if native and args[0].is_cpu and cpu.library():
            return getattr(torch.ops.dqrelo, name)(*args)  # from now on at once
        return op(*args)

    def launch(*args: Any) -> Any:
        from dqrelo_kernels.gpu import ops  # imports Triton

        return getattr(ops, name)(*others(args))

    _library.define(name + torch.library.infer_schema(op, mutates_args=mutated))
    _library.impl(name, guarded(compute), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dqrelo::{name}", fake, lib=_library)
    if triton:
        _launchers[name] = guarded(launch)


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    return x.new_empty(len(x), len(weight))


register(reference.delta_linear_, "y", "scratch", native=True, triton=True)
register(reference.delta_shrink_, "scratch", native=True, triton=True)
register(reference.delta_expand_, "y", native=True, triton=True)
register(linear, "whole", "scratch", fake=_linear_fake)
register(reference.merge_, "merged", "merged_bias", triton=True)
register(reference.expert_linear_, "y", native=True)
register(reference.delta_embedding_, "y", native=True, triton=True)
register(reference.delta_norm_, "y", native=True, triton=True)
use_launchers("CUDA", _library)
