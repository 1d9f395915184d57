# SPDX-License-Identifier: Apache-2.0
"""Measures a fine-tune's change, and recommends options of ``convert``."""

import math
import shlex
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from dqrelo_tools.adapter import is_adapter
from dqrelo_tools.allocate import allocate, exact_bytes, files_bytes, matrix_bytes
from dqrelo_tools.cost import TYPICAL_KL, Cost, cost_table
from dqrelo_tools.method import Method, Size
from dqrelo_tools.pair import (
    always_stored,
    fine_tune,
    half_of,
    is_exact,
    read_ahead,
)
from dqrelo_tools.plot import layer_of
from dqrelo_tools.report import Entry, Report, relative_error
from dqrelo_tools.sizes import format_size
from dqrelo_tools.spectrum import Spectrum
from dqrelo_tools.text_table import text_table
from vllm_dqrelo.format.checkpoint import Checkpoint, resolve
from vllm_dqrelo.format.config import MAX_SHARD_SIZE
from vllm_dqrelo.format.errors import DqreloError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATIOS = tuple(TYPICAL_KL)
GOOD = 0.3  # the relative error that a recommended ratio stays under
MORE_ERROR, MORE_CHANGE = 1.25, 2.0  # times that of the whole: worth a sentence
BINS = 256
ENERGY = 0.9
COLUMNS = {
    "mean_change": "mean |change|",
    "largest_singular_value": "largest sigma",
    "mean_singular_value": "mean sigma",
    "rank_90": "rank of 90%",
    "entropy": "entropy",
}
LEGEND = (
    f"sigma: singular values; rank of {ENERGY:.0%}: holds that much of the squared "
    f"norm; entropy: bits, of {BINS} bins over the range of a matrix"
)


@dataclass(frozen=True, eq=False)
class Look:
    """Measurements of the change of one matrix.

    Attributes:
        entry: its name, size and squared norm; no planes and no rank yet.
        half: the 16-bit float of its kind.
        mean_change: mean of |change|.
        entropy: see :func:`entropy`.
        spectrum: its singular values.
    """

    entry: Entry
    half: torch.dtype
    mean_change: float
    entropy: float
    spectrum: Spectrum

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, change: torch.Tensor) -> "Look":
        """Measure ``change``, float32 [N, K]; ``tensor`` is the fine-tune's."""
        spectrum = Spectrum.of(change)
        counts = (tensor.numel(), tensor.nbytes)
        return cls(
            Entry(name, "matrix", *counts, change=spectrum.total),
            half_of(tensor.dtype),
            float(change.abs().mean(dtype=torch.float64)),
            entropy(change),
            spectrum,
        )

    def numbers(self) -> dict[str, float]:
        """A value for each of COLUMNS."""
        return {
            "mean_change": self.mean_change,
            "largest_singular_value": self.spectrum.largest,
            "mean_singular_value": self.spectrum.mean,
            "rank_90": self.spectrum.rank_holding(ENERGY),
            "entropy": self.entropy,
        }

    def predicted(self, size: Size) -> Entry:
        """The entry that a conversion to ``size`` should report."""
        taken, missed = self.spectrum.taken(size), self.spectrum.error(size)
        return replace(self.entry, planes=taken.planes, rank=taken.rank, missed=missed)


def entropy(change: torch.Tensor) -> float:
    """How evenly the values use their range, in bits; 8 is the most.

    Semantics: ``-sum p log2 p`` of the shares p of BINS equal bins, from minus the
    largest magnitude to plus it.
    """
    peak = float(change.abs().max())
    share = torch.histc(change, BINS, -peak, peak).double() / change.numel()
    return float(torch.special.entr(share).sum()) / math.log(2)


@dataclass
class Survey:
    """A fine-tune and its base, parameter by parameter.

    Attributes:
        base, model: as they were named.
        looks: at the matrices that a delta would hold.
        others: entries of the other parameters, exact or unchanged.
    """

    base: str
    model: str
    looks: list[Look]
    others: list[Entry]

    @property
    def exact(self) -> dict[str, int]:
        """Bytes of the parameters that are stored as they are."""
        return {e.name: e.model_bytes for e in self.others if e.kind == "exact"}

    @property
    def weights(self) -> int:
        """The number of weights of the whole fine-tune."""
        return sum(e.weights for e in [*self.others, *(x.entry for x in self.looks)])

    def groups(self) -> dict[str, list[Look]]:
        """The matrices by module type, and once more by quarter of the layers."""
        modules: dict[str, list[Look]] = {}
        quarters: dict[int, list[Look]] = {}
        layers = [layer_of(look.entry) for look in self.looks]
        count = 1 + max((layer for layer in layers if layer is not None), default=0)
        for look, layer in zip(self.looks, layers, strict=True):
            modules.setdefault(look.entry.module, []).append(look)
            if layer is not None:
                quarters.setdefault(4 * layer // count, []).append(look)
        named = {}
        for quarter in sorted(quarters):
            first, last = -(-quarter * count // 4), -(-(quarter + 1) * count // 4) - 1
            named[f"layers {first}-{last}"] = quarters[quarter]
        return modules | named

    def uniform(self, ratio: float) -> Report:
        """What ``convert --ratio`` should report."""
        method = Method()
        entries = [*self.others, *(look.entry for look in self.looks)]
        ratios = method.ratios(ratio, {entry.name: entry.weights for entry in entries})
        sizes = {}
        for look in self.looks:
            name, shape = look.entry.name, look.spectrum.shape
            sizes[name] = method.size(*shape, ratios[name], look.half)
        return self.predicted(sizes)

    def allocated(self, budget: int) -> Report:
        """What ``convert --budget`` should report."""
        spectra = {look.entry.name: look.spectrum for look in self.looks}
        return self.predicted(allocate(spectra, self.exact, budget, MAX_SHARD_SIZE))

    def predicted(self, sizes: dict[str, Size]) -> Report:
        """The report of a conversion to ``sizes``, and an upper bound of its bytes."""
        entries, content = [*self.others], exact_bytes(self.exact)
        for look in self.looks:
            name, size = look.entry.name, sizes[look.entry.name]
            entries.append(look.predicted(size))
            content += matrix_bytes(name, *look.spectrum.shape, size)
        return Report(entries, files_bytes(content, MAX_SHARD_SIZE))


def survey(base: str, model: str, device: str = "cpu") -> Survey:
    """Every parameter of a fine-tune, measured one by one.

    Args:
        base: the base model, a folder or a Hub id.
        model: the fine-tune, likewise.
        device: where to compute.

    Raises:
        DqreloError: the two do not fit together, or do not differ.
        FileNotFoundError: one of the two is not there.
    """
    before, folder = Checkpoint(resolve(base)), resolve(model)
    if is_adapter(folder):
        raise DqreloError(
            f"{model} is a LoRA adapter, which a delta stores at its own rank: there "
            "is nothing to choose"
        )
    after = fine_tune(model, folder, base, before)
    looks, others = [], []
    names = tqdm(list(after), desc="advise", unit=" tensors", disable=None)
    pairs = read_ahead(before, after, list(after))
    for name, (tensor, change) in zip(names, pairs, strict=True):
        changed = bool(change.any()) or always_stored(name, before)
        if changed and not is_exact(name, tensor):
            looks.append(Look.of(name, tensor, change.to(device)))
        else:
            kind = "exact" if changed else "unchanged"
            others.append(Entry(name, kind, tensor.numel(), tensor.nbytes))
    if not looks and all(entry.kind == "unchanged" for entry in others):
        raise DqreloError(f"{model} has the weights of {base}: nothing to store")
    return Survey(base, model, looks, others)


class Advice:
    """The recommendation that follows from a survey.

    Attributes:
        survey: as it was made.
        budget: of all files with tensors, in bytes, or None.
        predictions: ratio -> what a conversion should report.
        costs: of each of these ratios.
        ratio: the recommended one, or what the budget comes to.
        report: what the recommended conversion should report.
        error: its relative error over all matrices.
    """

    def __init__(self, survey: Survey, budget: int | None = None) -> None:
        self.survey, self.budget = survey, budget
        self.predictions = {ratio: survey.uniform(ratio) for ratio in RATIOS}
        shapes = {look.entry.name: look.spectrum.shape for look in survey.looks}
        self.costs = [Cost.of(r, p, shapes) for r, p in self.predictions.items()]
        good = [cost.ratio for cost in self.costs if cost.relative_error < GOOD]
        best = min(self.costs, key=lambda cost: cost.relative_error)
        self.ratio = good[0] if good else best.ratio
        self.report = self.predictions[self.ratio]
        if budget is not None:
            self.ratio = budget / (2 * survey.weights)
            self.report = survey.allocated(budget)
        self.error = relative_error(self.report.entries)

    @property
    def command(self) -> str:
        """The command to run."""
        size = ["--ratio", f"{self.ratio:g}"]
        if self.budget is not None:
            size = ["--budget", format_size(self.budget)]
        pair = ["--base", self.survey.base, "--model", self.survey.model]
        return shlex.join(["dqrelo", "convert", *pair, *size, "--output", "DELTA"])

    def reasons(self) -> list[str]:
        """The reasons, in sentences."""
        if self.budget is not None:
            ratio = min(self.ratio, 1)
            same = self.survey.uniform(ratio)
            first = (
                f"{self.budget:,} bytes, divided among the matrices by what a byte "
                f"gains, should leave a relative error of {self.error:.3f}; --ratio "
                f"{ratio:g}, {relative_error(same.entries):.3f} with "
                f"{same.delta_bytes:,} bytes."
            )
        elif self.error < GOOD:
            first = (
                f"{self.ratio:g} is the smallest of these ratios with a predicted "
                f"relative error under {GOOD:g}: {self.error:.3f}."
            )
        else:
            first = (
                f"None of these ratios has a predicted relative error under {GOOD:g}; "
                f"{self.ratio:g} comes nearest, with {self.error:.3f}."
            )
        return [first, *self.remarks()]

    def remarks(self) -> list[str]:
        """A sentence for each group of matrices with a large error or change."""
        said = []
        planned = {entry.name: entry for entry in self.report.entries}
        average = mean(self.survey.looks, "mean_change")
        for group, looks in self.survey.groups().items():
            error = relative_error([planned[look.entry.name] for look in looks])
            if error > MORE_ERROR * self.error:
                said.append(
                    f"{group}: the predicted relative error is {error:.3f}, "
                    f"{error / self.error:.1f} times that of the whole."
                )
            change = mean(looks, "mean_change")
            if change > MORE_CHANGE * average:
                said.append(
                    f"{group}: the mean |change| is {change:.2e}, "
                    f"{change / average:.1f} times that of all matrices."
                )
        return said

    def to_dict(self) -> dict[str, Any]:
        """The content of ``--json``."""
        return {
            "matrices": {x.entry.name: x.numbers() for x in self.survey.looks},
            "groups": {
                group: {column: mean(looks, column) for column in COLUMNS}
                for group, looks in self.survey.groups().items()
            },
            "predictions": [asdict(cost) for cost in self.costs],
            "recommended": {
                "ratio": self.ratio,
                "budget": self.budget,
                "relative_error": self.error,
                "reasons": self.reasons(),
                "command": self.command,
                "report": self.report.to_dict(),
            },
        }

    def to_text(self) -> str:
        """The text for people."""
        groups = [["mean of", "matrices", *COLUMNS.values()]]
        for group, looks in self.survey.groups().items():
            values = [f"{mean(looks, column):.4g}" for column in COLUMNS]
            groups.append([group, str(len(looks)), *values])
        lines = [text_table(groups), LEGEND, "", cost_table(self.costs), ""]
        lines += [*self.reasons(), "", "Predicted:", self.report.to_text(), ""]
        return "\n".join([*lines, "Run:", f"  {self.command}"])


def mean(looks: list[Look], column: str) -> float:
    """The mean of one of COLUMNS over matrices, each of equal weight; or 0."""
    return fmean(look.numbers()[column] for look in looks) if looks else 0.0


def figure(advice: Advice) -> "Figure":
    """Predicted error against bytes, and the spectra of each module type."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(12, 5), layout="constrained")
    left, right = drawn.subplots(1, 2)
    sizes = [cost.delta_bytes for cost in advice.costs]
    errors = [cost.relative_error for cost in advice.costs]
    left.plot(sizes, errors, "o-", label="by --ratio")
    label = "recommended" if advice.budget is None else "the budget, divided"
    left.plot(advice.report.delta_bytes, advice.error, "r*", ms=14, label=label)
    left.axhline(GOOD, color="gray", linestyle=":")
    left.set(xlabel="bytes", ylabel="predicted ‖change − delta‖ / ‖change‖")
    left.set(xlim=(0, None), ylim=(0, None), title="Predicted relative error")
    for module in advice.report.modules():
        looks = [x for x in advice.survey.looks if x.entry.module == module]
        right.plot(*mean_spectrum(looks), label=module)
    right.set(xlabel="rank / smaller side", ylabel="singular value / largest")
    right.set(yscale="log", title="Singular values, mean of each module type")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    if advice.survey.looks:
        right.legend()
    return drawn


def mean_spectrum(looks: list[Look]) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values over the largest at 101 shares of the full rank, averaged."""
    shares = torch.linspace(0, 1, 101, dtype=torch.float64)
    total = torch.zeros_like(shares)
    for look in looks:
        squares = look.spectrum.squares
        at = (shares * (len(squares) - 1)).round().long()
        total += squares[at].sqrt() / (look.spectrum.largest or 1)
    return shares, total / len(looks)
