# SPDX-License-Identifier: Apache-2.0
"""What a delta of some ratio costs in quality, memory and time, before it is made."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from dqrelo_kernels.table import aligned
from dqrelo_tools.report import Report, relative_error
from dqrelo_tools.text_table import text_table
from vllm_dqrelo.format.checkpoint import EMBEDDINGS, HEADS, ends_with

# KL from the fine-tune as a share of the base's KL from it, on the fine-tune's task:
# geometric means of the full fine-tunes of benchmarks/results/quality.csv. It differs
# between fine-tunes by up to 7 times either way, and no number of the weights that
# we tried tells by how much (docs/benchmarks.md). Ratios that few fine-tunes were
# measured at are relative to 1/8.
TYPICAL_KL = {
    1 / 32: 4.9e-3,
    1 / 16: 1.2e-3,
    3 / 32: 6.4e-4,
    1 / 8: 3.4e-4,
    3 / 16: 7.0e-5,
    1 / 4: 4.3e-5,
}
Shapes = Mapping[str, tuple[int, int]]

CARDS_GB = (24, 48, 80)
UTILIZATION = 0.92  # of a card, as vLLM takes it by default
KV_SHARE = 1 / 4  # of a card, for KV cache and activations
MIXED = 8  # deltas in one decode step

HEAD: tuple[str, ...] = (
    "ratio",
    "bytes",
    "relative error",
    "KL",
    "1 delta",
    f"{MIXED} deltas",
)
HEAD += ("prompt", *(f"{size} GB" for size in CARDS_GB))
LEGEND = (
    "All columns are predictions. KL: from the fine-tune on its task, as a share of "
    "the base's, typical of full fine-tunes; a merged adapter has less. "
    f"1 delta, {MIXED} deltas: bytes that a decode step reads, with so many "
    "deltas in its batch, relative to the base's step. prompt: multiplications, "
    "likewise. GB: deltas on such a card next to the base, with a quarter of the card "
    "for the KV cache; dqrelo plan counts for other cards and traffic"
)


@dataclass(frozen=True)
class Cost:
    """The predicted costs of one ratio.

    Attributes:
        ratio: as for ``convert``.
        delta_bytes: of all files with tensors.
        relative_error: over all matrices.
        kl: typical KL from the fine-tune over the base's KL from it.
        decode: number of deltas in a decode step -> bytes that the step reads, over
            those of a step of the base.
        prompt: multiplications of a prompt, over those of the base's matrices.
        models: GB of a card -> deltas that it holds.
    """

    ratio: float
    delta_bytes: int
    relative_error: float
    kl: float
    decode: Mapping[int, float]
    prompt: float
    models: Mapping[int, int]

    @classmethod
    def of(cls, ratio: float, report: Report, shapes: Shapes) -> "Cost":
        """The costs of the conversion that ``report`` predicts.

        Args:
            ratio: a key of TYPICAL_KL.
            shapes: of the matrices that it compresses, by name.
        """
        size = report.delta_bytes
        base = 2 * sum(entry.weights for entry in report.entries)  # served in 16 bits
        return cls(
            ratio,
            size,
            relative_error(report.entries),
            TYPICAL_KL[ratio],
            {count: 1 + count * size / base for count in (1, MIXED)},
            prompt_work(report, shapes),
            {card: models_on(card * 10**9, base, size) for card in CARDS_GB},
        )

    def cells(self) -> list[str]:
        """A row of ``cost_table``."""
        return [
            str(Fraction(self.ratio).limit_denominator(1000)),
            f"{self.delta_bytes:,}",
            f"{self.relative_error:.4f}",
            f"{self.kl:.3%}",
            *(f"{times:.2f}x" for times in self.decode.values()),
            f"{self.prompt:.2f}x",
            *map(str, self.models.values()),
        ]


def cost_table(costs: Iterable[Cost]) -> str:
    """A line for each ratio, and what the columns mean."""
    return f"{text_table([HEAD, *(cost.cells() for cost in costs)])}\n{LEGEND}"


def prompt_work(report: Report, shapes: Shapes) -> float:
    """Multiplications of a prompt's tokens, over those of the base's matrices.

    Semantics: ``1 + sum (planes N K + rank (N + K)) / sum N K`` over the matrices but
    embedding and LM head, which a prompt's tokens do not multiply. A GPU merges the
    delta of a long prompt into the weights, which takes fewer.
    """
    whole = extra = 0.0
    for entry in report.entries:
        if entry.name in shapes and not ends_with(entry.name, EMBEDDINGS + HEADS):
            n, k = shapes[entry.name]
            whole += n * k
            extra += entry.planes * n * k + entry.rank * (n + k)
    return 1 + extra / whole if whole else 1.0


def models_on(card: int, base: int, delta: int) -> int:
    """Deltas that fit on a card, in bytes, next to their base and its KV cache."""
    room = math.floor(card * (UTILIZATION - KV_SHARE)) - base
    return max(room // aligned(delta), 0) if delta else 0
