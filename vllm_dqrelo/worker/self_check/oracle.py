# SPDX-License-Identifier: Apache-2.0
"""What a step computes with one merged delta: ordinary products in place of the ops."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_dqrelo.worker import compat
from vllm_dqrelo.worker.self_check.cases import normed
from vllm_dqrelo.worker.self_check.synthetic import Named, Synthetic
from vllm_dqrelo.worker.sites import Site

if TYPE_CHECKING:
    from vllm_dqrelo.worker.manager import DeltaManager

CHUNK = 2**24  # elements of a dense change that are in memory at a time


class Oracle(TorchDispatchMode):
    """Answers each op of this project for a step whose rows are all of one delta.

    Semantics: a linear layer whose weight the op may read is ``x (W + delta)^T + bias``
    with a matrix rounded to the dtype of W; another layer is ``y + x delta^T``. Neither
    arena, table, rows nor slots are read, but for the rows of each expert.

    Args:
        manager: of the worker.
        parameters: site -> its parameters.
        delta: of all rows.
    """

    def __init__(
        self,
        manager: "DeltaManager",
        parameters: dict[str, list[Named]],
        delta: Synthetic,
    ) -> None:
        super().__init__()
        self.delta, self.device = delta, manager.device
        changed = {*delta.matrices, *delta.exact}
        self.sites: dict[int, Site] = {}
        self.at: dict[str, dict[tuple[int, str], Named]] = {}
        for name, site in manager.sites.by_name.items():
            self.sites[manager.residency.table(site).data_ptr()] = site
            self.at[name] = {
                (p.place.index, p.place.leaf): p
                for p in parameters[name]
                if p.name in changed
            }
        self.ops: dict[str, Callable[..., Any]] = {
            "linear": self._linear,
            "delta_linear_": self._add,
            "sharded_linear_": self._add,
            "delta_embedding_": self._embed,
            "delta_norm_": self._norm,
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if experts := compat.experts_behind(func):
            with self:
                return experts(*args, **(kwargs or {}))
        own = self.ops.get(func._opname) if func.namespace == "dqrelo" else None
        if own is None:
            return func(*args, **(kwargs or {}))
        names = (argument.name for argument in func._schema.arguments)
        given = dict(zip(names, args, strict=True))
        return own(self.sites[given["table"].data_ptr()], given)

    def _linear(self, site: Site, given: dict[str, Any]) -> torch.Tensor:
        x, weight, bias = given["x"], given["weight"], given["bias"]
        y = F.linear(x, weight, bias)
        for rows, change, moved in self._changes(site, 0):
            merged = _sum(weight[rows], change)
            own = None if bias is None else _sum(bias[rows], moved)
            y[:, rows] = F.linear(x, merged, own)
        return y

    def _add(self, site: Site, given: dict[str, Any]) -> None:
        y, x = given["y"], given["x"]
        if site.experts == 1:
            groups = [(0, torch.arange(len(x), device=x.device))]
        else:
            starts, rows = given["starts"].tolist(), given["rows"]
            groups = [
                (pair % site.experts, rows[starts[pair] : starts[pair + 1]].long())
                for pair in range(len(starts) - 1)
                if starts[pair] < starts[pair + 1]
            ]
        for expert, mine in groups:
            for rows, change, moved in self._changes(site, expert):
                out = y[mine, rows].float()
                if change is not None:
                    out += x[mine].float() @ change.T
                if moved is not None:
                    out += moved
                y[mine, rows] = out.to(y.dtype)

    def _embed(self, site: Site, given: dict[str, Any]) -> None:
        y, ids = given["y"], given["ids"].long()
        if parameter := self.at[site.name].get((0, "weight")):
            change = self.delta.change(parameter, ids, self.device).dense()
            y.copy_((y.float() + change).to(y.dtype))

    def _norm(self, site: Site, given: dict[str, Any]) -> None:
        at = self.at[site.name]
        if at:
            y = normed(site, at, self.delta, given["x"].float())
            given["y"].copy_(y.to(given["y"].dtype))

    def _changes(
        self, site: Site, expert: int
    ) -> Iterator[tuple[slice, torch.Tensor | None, torch.Tensor | None]]:
        """Output features of a layer, what their matrix changes by, and their bias."""
        at, start = self.at[site.name], 0
        for j, size in enumerate(site.of_a_row):
            index = expert * len(site.of_a_row) + j
            matrix, bias = at.get((index, "weight")), at.get((index, "bias"))
            moved = None
            if bias is not None and site.adds_bias:
                moved = self.delta.parameter(bias.name)[bias.place.rows]
                moved = (moved - site.base_vector("bias", index)).to(self.device)
            height = max(1, CHUNK // site.columns)
            for first in range(0, size, height) if matrix or bias else ():
                rows = torch.arange(first, min(first + height, size))
                change = None
                if matrix is not None:
                    change = self.delta.change(matrix, rows, self.device).dense()
                yield (
                    slice(start + first, start + first + len(rows)),
                    change,
                    None if moved is None else moved[rows.to(self.device)],
                )
            start += size


def _sum(base: torch.Tensor, change: torch.Tensor | None) -> torch.Tensor:
    """Base and change, summed in float32 and rounded once."""
    return base if change is None else (base.float() + change).to(base.dtype)
