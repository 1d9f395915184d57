# SPDX-License-Identifier: Apache-2.0
"""The singular values of a change, and the error that they predict."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from dqrelo_tools.method import Size
from dqrelo_tools.svd import EXACT_SVD, gram_in_double, largest_singular_vectors
from vllm_dqrelo.format.tensors import INT4

TOP = 512  # singular values of a matrix with more than EXACT_SVD of them
# What sign planes leave of the variance of a Gaussian: none, its mean magnitude with
# its sign (1 - 2 / pi), and the four levels of Lloyd and Max.
RHO = (1.0, 0.363, 0.1175)
EPS = 0.023  # of the low-rank part's squared norm, lost by factors of four bits


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Squared singular values of one matrix.

    Attributes:
        shape: N, K.
        squares: float64 [min(N, K)], largest first. Where min(N, K) > EXACT_SVD, the
            mean of the rest stands for each one beyond the TOP largest.
    """

    shape: tuple[int, int]
    squares: torch.Tensor

    @classmethod
    def of(cls, change: torch.Tensor) -> "Spectrum":
        """The spectrum of ``change``, float32 [N, K]."""
        n, k = change.shape
        tall = change if n >= k else change.T
        count = tall.shape[1]
        if count <= EXACT_SVD:
            squares = torch.linalg.eigvalsh(gram_in_double(tall)).flip(0).clamp_min(0)
            return cls((n, k), squares.cpu())
        total = torch.linalg.vector_norm(tall, dtype=torch.float64).square()
        largest, _ = largest_singular_vectors(tall, TOP)
        largest = largest.norm(dim=0, dtype=torch.float64).square()
        rest = (total - largest.sum()).clamp_min(0) / (count - TOP)
        return cls((n, k), torch.cat((largest, rest.expand(count - TOP))).cpu())

    @cached_property
    def heads(self) -> torch.Tensor:
        """float64 [1 + min(N, K)]: the sum of the r largest squares, for each r."""
        return torch.cat((self.squares.new_zeros(1), self.squares.cumsum(0)))

    @property
    def total(self) -> float:
        """The squared Frobenius norm."""
        return float(self.heads[-1])

    @property
    def largest(self) -> float:
        """The largest singular value."""
        return float(self.squares[0]) ** 0.5

    @property
    def mean(self) -> float:
        """The mean singular value; with more than EXACT_SVD an upper bound."""
        return float(self.squares.sqrt().mean())

    def rank_holding(self, share: float) -> int:
        """The least rank with ``share`` of the squared norm; likewise."""
        return int((self.heads < share * self.heads[-1]).sum())

    def taken(self, size: Size) -> Size:
        """The planes, ranks and dtype that ``compress`` will take for ``size``.

        Semantics: half of the ranks, of int8, where ``EPS head(rank)`` is more than
        the squares between half of the ranks and all (``Factors.is_of_few_ranks``).
        """
        half = size.rank // 2
        head, first = float(self.heads[size.rank]), float(self.heads[half])
        if size.dtype != INT4 or not half or EPS * head <= head - first:
            return size
        return replace(size, rank=half, dtype=torch.int8)

    def error(self, size: Size) -> float:
        """The squared error that ``compress`` will leave with ``taken(size)``.

        Semantics: ``RHO[planes] (tail(rank) + EPS head(rank))``, with head the sum of
        the squares up to the rank and tail the sum beyond it; without EPS for int8.
        """
        size = self.taken(size)
        head = float(self.heads[size.rank])
        rounded = EPS * head if size.dtype == INT4 else 0.0
        return RHO[size.planes] * (self.total - head + rounded)
