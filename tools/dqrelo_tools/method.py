# SPDX-License-Identifier: Apache-2.0
"""What a delta of some ratio spends on each matrix, by the paper's method and ours."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dqrelo_kernels.layout import words_per_row
from dqrelo_kernels.table import factor_bytes
from vllm_dqrelo.format import config
from vllm_dqrelo.format.checkpoint import EMBEDDINGS, HEADS, ends_with
from vllm_dqrelo.format.tensors import INT4

BITS = 16  # of a full-precision weight
SHAPE_BYTES = 16  # of the stored shape of each matrix
# A plane is bought only with a low-rank part of at least a bit a weight. Squared error
# would buy it earlier, but does not order by KL: at 1.5 bits a plane leaves less error
# than none (0.29, 0.35), and more KL (4.8e-3, 1.4e-3; docs/benchmarks.md).
LOW_RANK_BITS = 1.0
MAX_PLANES = 2
# The share of the weights above which embedding and LM head have a smaller ratio than
# the other matrices. With less, as in most models, their bytes help the others little,
# and at 1/8 the embedding would lose its signs (benchmarks/results/shares.csv).
MANY = 1 / 2
# The most that the others are given: at 1/8 the KL of Gemma 3 270M on the task is lower
# with 0.22 for its linear layers than with 0.25 (shares.csv).
ENOUGH = 1 / 4


@dataclass(frozen=True)
class Size:
    """What a matrix may spend.

    Attributes:
        planes: sign planes.
        rank: of the low-rank part.
        dtype: of the factors; INT4 counts two to a byte.
        by_row: whether each row of a plane has its own scale.
    """

    planes: int
    rank: int
    dtype: torch.dtype
    by_row: bool = True

    def bytes(self, n: int, k: int) -> int:
        """Size of the stored tensors of an n x k matrix, without their names."""
        size = SHAPE_BYTES + self.planes * (
            2 * n * words_per_row(k) + 4 * (n if self.by_row else 1)
        )
        size += factor_bytes(self.rank, k, self.dtype)
        size += factor_bytes(n, self.rank, self.dtype)
        return size + (0 if self.dtype.is_floating_point else 4 * self.rank)


@dataclass(frozen=True)
class Method:
    """How a matrix is compressed.

    Attributes:
        planes: sign planes; None for as many as the ratio is worth.
        by_row: whether each row of a plane has its own scale.
        dtype: of the factors; None for 16-bit floats of the fine-tune's own kind.
        low_rank_first: whether the low-rank part is taken before the signs.
        sweeps: how often both are taken again, each from what the other leaves;
            only with factors of integers.
        round_up: whether the rank is the paper's, which exceeds the ratio by a part
            of one rank, and counts factors of 16 bits next to one plane.
        most_of_tokens: the share of a delta's bytes for embedding and LM head, where
            they have more than MANY of the weights. Most of their rows are of tokens
            that a text does not use.
    """

    planes: int | None = None
    by_row: bool = True
    dtype: torch.dtype | None = INT4
    low_rank_first: bool = True
    sweeps: int = 1
    round_up: bool = False
    most_of_tokens: float = 0.25

    def ratios(self, ratio: float, weights: Mapping[str, int]) -> dict[str, float]:
        """The ratio of each parameter, in a delta of ``ratio``.

        Semantics: ``ratio``, unless embedding and LM head have a share ``s`` of the
        weights that is above MANY and ``m = most_of_tokens``. Then ``others = min(ratio
        (1 - m) / (1 - s), max(ratio, ENOUGH))``, and for these two what is left:
        ``(ratio - others (1 - s)) / s``. The mean over all weights is ``ratio``.

        Args:
            ratio: at most 1.
            weights: parameter -> the number of its weights, of the whole model.
        """
        of_tokens = {name for name in weights if ends_with(name, EMBEDDINGS + HEADS)}
        share = sum(weights[name] for name in of_tokens) / sum(weights.values())
        if not max(self.most_of_tokens, MANY) < share < 1:
            return dict.fromkeys(weights, ratio)
        others = ratio * (1 - self.most_of_tokens) / (1 - share)
        others = min(others, max(ratio, ENOUGH))
        rest = (ratio - others * (1 - share)) / share
        return {name: rest if name in of_tokens else others for name in weights}

    def size(self, n: int, k: int, ratio: float, half: torch.dtype) -> Size:
        """What an n x k matrix may spend: the largest rank that fits into the ratio.

        Args:
            n, k: shape of the matrix.
            ratio: of 16 bits per weight.
            half: bfloat16 or float16, where ``dtype`` is None.
        """
        if self.round_up:
            return Size(1, rank_of(n, k, ratio), half, self.by_row)
        dtype, budget = self.dtype or half, int(ratio * BITS * n * k / 8)
        planes = self.planes
        if planes is None:
            worth = math.floor(BITS * ratio - LOW_RANK_BITS)
            planes = min(max(worth, 0), MAX_PLANES)
        if Size(planes, 0, dtype, self.by_row).bytes(n, k) > budget:
            planes = self.planes or 0  # tiny: the scales of the rows are too much
        left = budget - Size(planes, 0, dtype, self.by_row).bytes(n, k)
        # Two ranks at a time, because a byte holds two of INT4.
        pair = Size(0, 2, dtype).bytes(n, k) - Size(0, 0, dtype).bytes(n, k)
        rank = min(max(left // pair * 2, 0 if planes else 1), n, k)
        return Size(planes, rank, dtype, self.by_row)


PAPER = Method(
    planes=1,
    by_row=False,
    dtype=None,
    low_rank_first=False,
    sweeps=0,
    round_up=True,
    most_of_tokens=1.0,
)
METHODS = {config.DQRELO: Method(), config.PAPER: PAPER}


def rank_of(n: int, k: int, ratio: float) -> int:
    """The rank that fills what one sign plane leaves of the ratio, in the paper.

    Semantics: ``ceil(n k p1 / (n + k))`` with ``p1 = ratio - 1/16`` (equations 12
    and 16).
    """
    return math.ceil(n * k * (ratio - 1 / BITS) / (n + k))
