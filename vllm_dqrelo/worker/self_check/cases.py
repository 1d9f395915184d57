# SPDX-License-Identifier: Apache-2.0
"""The ops of one site: what a step passes to them, and what they must compute."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.distributed import all_reduce
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from dqrelo_kernels.layout import unpack_int4, unpack_signs
from dqrelo_kernels.rows import BASE, ExpertGroups, RowGroups
from vllm_dqrelo.format.tensors import INT4, MatrixDelta
from vllm_dqrelo.worker.fully_sharded import linear_of
from vllm_dqrelo.worker.self_check.report import Report
from vllm_dqrelo.worker.self_check.synthetic import Named, Synthetic
from vllm_dqrelo.worker.sites import Site

if TYPE_CHECKING:
    from vllm_dqrelo.worker.manager import DeltaManager

SAMPLES = 32  # rows of a step, and output features of a slice, that are compared
EPS = torch.finfo(torch.float32).eps


class Exact(NamedTuple):
    """A change in float64, and the parts that it is the sum of.

    Attributes:
        change: [n, K].
        a: [R, K], times lora_scale.
        b: [n, R].
        scale: [n], of all planes together.
    """

    change: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, matrix: MatrixDelta) -> "Exact":
        """Unpack a compressed change."""
        a, b, k = matrix.lora_a, matrix.lora_b, matrix.shape[1]
        if a.dtype == INT4:
            a, b = unpack_int4(a, k), unpack_int4(b, matrix.rank)
        a, b = a.double(), b.double()
        if matrix.lora_scale is not None:
            a = matrix.lora_scale.double()[:, None] * a
        change, scale = b @ a, matrix.scale.double()
        for i, plane in enumerate(matrix.signs):
            change += scale[i, :, None] * unpack_signs(plane, k, torch.float64)
        return cls(change, a, b, scale.abs().sum(0))

    def tolerance(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """How far a product with float64 ``x`` [M, K] may be off, unrounded: [M, n].

        A float32 sum of K terms is off by about sqrt(K) eps times the root of the sum
        of their squares; 16 times that is allowed. Beside activations of 16 bits, A, x
        and A x may each be rounded to one part in 2^8: twice that is allowed.
        """
        unit = 16 * math.sqrt(x.shape[1]) * EPS
        signs = x.norm(dim=1, keepdim=True) * self.scale
        terms = (x.square() @ self.a.square().T).sqrt()
        lost = 0.0 if dtype == torch.float32 else 2.0**-7
        low_rank = (unit + lost) * (terms + (x @ self.a.T).abs()) @ self.b.abs().T
        return unit * signs + low_rank


class Case(ABC):
    """One site with its deltas.

    Args:
        manager: of the worker.
        site: in the model.
        parameters: of the site.
        deltas: that are resident.
        slots: of each of them.
        report: takes the errors.
    """

    op = ""

    def __init__(
        self,
        manager: "DeltaManager",
        site: Site,
        parameters: list[Named],
        deltas: list[Synthetic],
        slots: list[int],
        report: Report,
    ) -> None:
        self.manager, self.site, self.deltas, self.slots = manager, site, deltas, slots
        self.report, self.device = report, manager.device
        self.at = {(p.place.index, p.place.leaf): p for p in parameters}
        self.dtype = manager.model_config.dtype
        self.on_device = manager.residency.deltas(site)
        self.groups = RowGroups(manager.max_tokens, manager.memory.slots, self.device)
        self.generator = torch.Generator(self.device).manual_seed(0)

    @abstractmethod
    def inputs(self, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        """y, what the base computed, and x, what the op reads: of ``m`` rows."""

    @abstractmethod
    def run(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Call the op."""

    @abstractmethod
    def compare(
        self, got: torch.Tensor, y: torch.Tensor, x: torch.Tensor, owners: np.ndarray
    ) -> None:
        """See whether ``got`` is what the op must make of ``y``."""

    def check(self, m: int) -> None:
        """A step of ``m`` rows, of which some are the base's."""
        owners = self._begin(m)
        y, x = self.inputs(m)
        base = torch.from_numpy(owners == BASE).to(self.device)
        y[base] = torch.nan  # what no delta may read or write
        if x.is_floating_point():
            x[base] = torch.nan
        self.manager.step.scratch.fill_(torch.nan)
        got = y.clone()
        self.run(got, x)
        self.report.same(self.op, got[base], y[base], f"rows of the base, {self}")
        self.compare(got, y, x, owners)

    def check_graph(self, m: int) -> None:
        """A captured graph, replayed with other rows, deltas and numbers."""
        self._begin(m)
        y, x = self.inputs(m)
        got = y.clone()
        self.run(got, x)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got.copy_(y)
            self.run(got, x)
        self._begin(m, shift=1)
        for buffer, fresh in zip((y, x), self.inputs(m), strict=True):
            buffer.copy_(fresh)
        graph.replay()
        eager = y.clone()
        self.run(eager, x)
        self.report.same("graph", got, eager, f"a replayed graph, {self}")

    def _begin(self, m: int, shift: int = 0) -> np.ndarray:
        """Set the rows of a step; the delta of each row, by its number here."""
        owners = (np.arange(m) * 7 // 3 + shift) % (len(self.deltas) + 1)
        owners = np.where(owners == len(self.deltas), BASE, owners)
        self.groups.set(np.array([*self.slots, BASE], dtype=np.int32)[owners])
        return owners

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers in the dtype of activations."""
        numbers = torch.randn(shape, generator=self.generator, device=self.device)
        return numbers.to(self.dtype)

    def some(self, size: int) -> torch.Tensor:
        """At most SAMPLES numbers below ``size``, with the first and the last."""
        return torch.linspace(0, size - 1, min(size, SAMPLES)).long()

    def rows_of(self, number: int, owners: np.ndarray) -> torch.Tensor:
        """Those rows of ``some`` that belong to a delta."""
        rows = self.some(len(owners))
        return rows[torch.from_numpy(owners)[rows] == number].to(self.device)

    def rounding(self, want: torch.Tensor) -> torch.Tensor:
        """Half a unit in the last place."""
        tiny = torch.finfo(self.dtype).tiny
        return 0.51 * torch.finfo(self.dtype).eps * want.abs() + tiny

    def __str__(self) -> str:
        shape = f"{list(self.site.of_a_row)} x {self.site.columns or 1}"
        kinds = " and ".join(str(delta.kind) for delta in self.deltas)
        return f"{self.site.name} {shape}, {self.dtype}, deltas of {kinds}"


class Linear(Case):
    """A linear layer, an LM head, or one matrix of all experts."""

    op = "delta_linear_"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.add = linear_of(self.site)
        slices = len(self.on_device.slices) - 1
        entries = self.on_device.table
        self.on_device = self.on_device._replace(
            table=entries.view(-1, slices, entries.shape[-1])
        )

    def inputs(self, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.experts = torch.arange(m, device=self.device) * 5 % self.site.experts
        return self.random(m, sum(self.site.of_a_row)), self.random(
            m, self.site.columns
        )

    def run(self, y: torch.Tensor, x: torch.Tensor) -> None:
        scratch, groups = self.manager.step.scratch, self.groups.of_rows
        if self.site.experts > 1:
            slots = len(self.on_device.table) // self.site.experts
            by_row = self.groups.by_row[: len(x)]
            groups = (
                *ExpertGroups.of(by_row, self.experts, slots, self.site.experts),
                self.groups.num_active,
            )
        self.add(y, scratch, x, *self.on_device, *groups)

    def compare(
        self, got: torch.Tensor, y: torch.Tensor, x: torch.Tensor, owners: np.ndarray
    ) -> None:
        starts = [0, *np.cumsum(self.site.of_a_row)]
        for delta, expert, mine in self._groups(owners):
            for j, size in enumerate(self.site.of_a_row):
                some = self.some(size).to(self.device)
                outputs = starts[j] + some
                before = y[mine][:, outputs]
                want, tolerance = self._want(delta, expert, j, some, x[mine])
                change = got[mine][:, outputs].double() - before.double()
                want, tolerance, change = self._of_all(want, tolerance, change)
                total = before.double() + want
                self.report.compare(
                    self.op,
                    before.double() + change,
                    total,
                    tolerance + self.rounding(total),
                    f"{len(x)} rows of {self}",
                )

    def _groups(
        self, owners: np.ndarray
    ) -> Iterator[tuple[Synthetic, int, torch.Tensor]]:
        """Delta, expert and rows of each pair of the two."""
        for number, delta in enumerate(self.deltas):
            rows = self.rows_of(number, owners)
            experts = self.experts[rows]
            for expert in experts.unique().tolist():
                yield delta, expert, rows[experts == expert]

    def _want(
        self, delta: Synthetic, expert: int, j: int, some: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What slice ``j`` adds, and by how much it may be off: float64 [M, n]."""
        x, index = x.double(), expert * len(self.site.of_a_row) + j
        want = x.new_zeros(len(x), len(some))
        tolerance = torch.zeros_like(want)
        if parameter := self.at.get((index, "weight")):
            change = delta.change(parameter, some, self.device)
            exact = Exact.of(change)
            want += x @ exact.change.T
            tolerance += exact.tolerance(x, self.dtype)
        if (parameter := self.at.get((index, "bias"))) and self.site.adds_bias:
            moved = delta.parameter(parameter.name)[parameter.place.rows]
            moved = moved - self.site.base_vector("bias", index)
            want += moved.to(self.device)[some].double()
            tolerance += EPS * want.abs()
        return want, tolerance

    def _of_all(self, *parts: torch.Tensor) -> list[torch.Tensor]:
        """Sums over workers that have some ranks of B, and some columns, each."""
        if not (self.site.fully_sharded and self.site.splits_columns):
            return list(parts)
        for part in parts:
            all_reduce(part, group=get_tp_group().device_group)
        return list(parts)


class Embedding(Case):
    """A table whose rows are looked up."""

    op = "delta_embedding_"

    def inputs(self, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(
            self.site.sizes[0], (m,), generator=self.generator, device=self.device
        )
        return self.random(m, self.site.columns), ids

    def run(self, y: torch.Tensor, x: torch.Tensor) -> None:
        rows, slots, _, num_active = self.groups.of_rows
        torch.ops.dqrelo.delta_embedding_(
            y, x, *self.on_device, rows, slots, num_active
        )

    def compare(
        self, got: torch.Tensor, y: torch.Tensor, x: torch.Tensor, owners: np.ndarray
    ) -> None:
        parameter = self.at.get((0, "weight"))
        for number, delta in enumerate(self.deltas):
            rows = self.rows_of(number, owners)
            if parameter is None or not len(rows):
                continue
            exact = Exact.of(delta.change(parameter, x[rows], self.device))
            want = y[rows].double() + exact.change
            unit = 4 * math.sqrt(delta.kind.rank + 1) * EPS
            unit += 0.0 if self.dtype == torch.float32 else 2.0**-7
            tolerance = unit * exact.b.abs() @ exact.a.abs()
            tolerance += 4 * EPS * exact.scale[:, None]
            self.report.compare(
                self.op,
                got[rows],
                want,
                tolerance + self.rounding(want),
                f"{len(x)} rows of {self}",
            )


class Norm(Case):
    """A norm with another weight, and maybe another bias."""

    op = "delta_norm_"

    def inputs(self, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        k = self.site.sizes[0]
        shape = (m, 3, k) if k <= 256 else (m, k)  # of a head, or of a row
        return self.random(*shape), self.random(*shape)

    def run(self, y: torch.Tensor, x: torch.Tensor) -> None:
        deltas: Any = self.site.module.deltas
        rows, slots, _, num_active = self.groups.of_rows
        torch.ops.dqrelo.delta_norm_(
            y,
            x,
            self.on_device.arena,
            self.on_device.table,
            rows,
            slots,
            num_active,
            deltas.eps,
            deltas.centred,
        )

    def compare(
        self, got: torch.Tensor, y: torch.Tensor, x: torch.Tensor, owners: np.ndarray
    ) -> None:
        for number, delta in enumerate(self.deltas):
            rows = self.rows_of(number, owners)
            if not len(rows):
                continue
            want = normed(self.site, self.at, delta, x[rows].double())
            tolerance = 256 * EPS * (1 + want.abs()) + self.rounding(want)
            self.report.compare(
                self.op, got[rows], want, tolerance, f"{len(x)} rows of {self}"
            )


def normed(
    site: Site,
    at: dict[tuple[int, str], Named],
    delta: Synthetic,
    x: torch.Tensor,
) -> torch.Tensor:
    """What a norm of base and delta makes of ``x`` [M, ..., K], in its dtype."""
    deltas: Any = site.module.deltas
    if deltas.centred:
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + deltas.eps)
    weight, bias = (_vector(site, at, delta, leaf) for leaf in ("weight", "bias"))
    if weight is not None:
        y = y * weight.to(x)
    return y if bias is None else y + bias.to(x)


def _vector(
    site: Site, at: dict[tuple[int, str], Named], delta: Synthetic, leaf: str
) -> torch.Tensor | None:
    """The weight or the bias of a norm with a delta, as the op multiplies by it."""
    if parameter := at.get((0, leaf)):
        # Gemma's norm multiplies by 1 + weight.
        gemma = isinstance(site.module, GemmaRMSNorm)
        return delta.parameter(parameter.name) + (1 if gemma else 0)
    return site.base_vector(leaf) if site.has(leaf) else None
