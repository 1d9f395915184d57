# SPDX-License-Identifier: Apache-2.0
"""The mathematics of one matrix. No I/O.

The paper's method (arXiv 2604.16940, section 3.3) and ours are the same three steps in
another order and other numbers: sign planes with scales, a low-rank part, and rounding
of its factors. ``METHODS`` (method.py) names both; ``compress`` is the whole of it.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from dqrelo_kernels.layout import pack_int4, pack_signs, words_per_row
from dqrelo_tools.method import Method, Size
from dqrelo_tools.pieces import pieces, rows_of_piece
from dqrelo_tools.svd import truncated_svd
from vllm_dqrelo.format.tensors import INT4, MatrixDelta

# The most by which a low-rank part alone is lengthened. What truncation leaves out
# pulls every matrix back to the base, and the pulls add up. KL falls until about here
# (benchmarks/results/strength.csv).
MAX_STRENGTH = 1.05

# The share of all ranks up to which a part that a sweep refits is not refitted before:
# with more, most of what the part misses is rounding. Rank 788 of 4096 takes 1.1 s
# less (AMD EPYC, 2 cores), and KL is as low.
FEW_RANKS = 1 / 2


def compress(
    delta: torch.Tensor, size: Size, method: Method, of_tokens: bool = False
) -> MatrixDelta:
    """Approximate ``delta`` by sign planes and a low-rank part.

    Semantics: ``delta ~ sum_q scale_q * signs_q + B A``. Each part is taken from what
    the other one leaves, first in the method's order and then ``sweeps`` times more;
    the best of all pairs, by squared error, is kept. Neither is random. A low-rank part
    of integers without planes is fitted in halves where rows are tokens' and is then
    multiplied by its ``strength``. INT4 gives way to int8, in as many bytes, where the
    change is of few ranks (``Factors.is_of_few_ranks``), as that of a merged adapter:
    what is left out there is rounding of the checkpoint, and not lengthened for.

    Args:
        delta: [N, K] float32, fine-tune minus base.
        size: as ``method.size`` gives it.
        method: the order of the steps.
        of_tokens: whether each row is a token's, as in an embedding or LM head.
    """
    return stored(delta.shape, *fitted(delta, size, method, of_tokens))


def fitted(
    delta: torch.Tensor, size: Size, method: Method, of_tokens: bool
) -> tuple["Planes", "Factors"]:
    """Both parts of ``compress``. Few matrices as large as ``delta`` live at a time."""
    integral = size.rank and not size.dtype.is_floating_point
    sweeps = method.sweeps if size.planes and integral else 0
    if method.low_rank_first:
        refit = not sweeps or size.rank > FEW_RANKS * min(delta.shape)
        size, part, left = low_rank(delta, size, of_tokens, refit)
        planes = Planes.of(left, size)
    else:
        planes = Planes.of(delta, size)
        part = Factors.of(planes.left_of(delta), size.rank, size.dtype)
        left = part.left_of(delta) if sweeps else delta
    best = planes, part
    least = planes.missed(left) if sweeps else 0.0
    for _ in range(sweeps):
        del left
        part = part.refitted(planes.left_of(delta))
        left = part.left_of(delta)
        planes = Planes.of(left, size)
        if (error := planes.missed(left)) < least:
            best, least = (planes, part), error
    return best


def low_rank(
    delta: torch.Tensor, size: Size, of_tokens: bool, refit: bool
) -> tuple[Size, "Factors", torch.Tensor]:
    """The first part of a method that takes it first, and what it leaves.

    Args:
        delta: the change, float32 [N, K].
        size: of the whole.
        of_tokens: whether each row is a token's.
        refit: whether integers are refitted.

    Returns:
        The size, which has other factors where the change is of few ranks; the part;
        ``delta`` minus the part as it was fitted, float32 [N, K].
    """
    alone = not size.planes and not size.dtype.is_floating_point
    in_halves = alone and of_tokens
    if in_halves:
        part = Factors.in_halves(delta, size.rank, size.dtype)
    else:
        part = Factors.of(delta, size.rank, size.dtype, refit)
    left = part.left_of(delta)
    if not in_halves and part.is_of_few_ranks(delta, left):
        del left
        size = replace(size, rank=size.rank // 2, dtype=torch.int8)
        part = Factors.of(delta, size.rank, size.dtype, refit)
        return size, part, part.left_of(delta)
    if alone and part.scale is not None:
        part.scale = part.scale * strength(delta, left)
    return size, part, left


def strength(delta: torch.Tensor, left: torch.Tensor) -> float:
    """The factor that gives a part the length of ``delta``, at most MAX_STRENGTH.

    Semantics: ``min(||delta|| / ||delta - left||, MAX_STRENGTH)`` (Frobenius), at
    least 1.

    Args:
        delta: the change, float32 [N, K].
        left: what the part leaves of it.
    """
    whole, length = squared_norm(delta) ** 0.5, squared_distance(delta, left) ** 0.5
    return min(max(whole / length, 1.0), MAX_STRENGTH) if length else 1.0


class Planes:
    """Sign planes and their scales: ``sum_q scale[q] * signs[q]``.

    Attributes:
        positive: bool [Q, N, K], True for +1.
        scale: float32 [Q, N] or [Q, 1].
    """

    def __init__(self, positive: torch.Tensor, scale: torch.Tensor) -> None:
        self.positive, self.scale = positive, scale

    @classmethod
    def of(cls, matrix: torch.Tensor, size: Size) -> "Planes":
        """The planes nearest to ``matrix`` [N, K] in squared error.

        One plane: ``mean |matrix|`` times ``sign(matrix)``, with ``sign(0) = -1``
        (equations 6 to 9). Two planes: the four levels ``+-low, +-high`` of Lloyd's
        quantiser, which are ``+-(high + low) / 2 +- (high - low) / 2``.
        """
        n, k = matrix.shape
        if size.planes == 0:
            signs = matrix.new_empty(0, n, k, dtype=torch.bool)
            return cls(signs, matrix.new_empty(0, 1))
        positive = matrix > 0
        if size.planes == 1:
            sizes = [some.abs().mean(1, dtype=torch.float64) for some in pieces(matrix)]
            scale = torch.cat(sizes)
            scale = scale if size.by_row else scale.mean(0, keepdim=True)
            return cls(positive[None], scale.float()[None])
        groups = pieces(matrix) if size.by_row else (matrix.reshape(1, -1),)
        levels = [four_levels(some.abs()) for some in groups]
        low, high, large = map(torch.cat, zip(*levels, strict=True))
        large = large.reshape(n, k)
        scale = torch.stack(((high + low) / 2, (high - low) / 2))
        return cls(torch.stack((positive, positive == large)), scale)

    def dense(self) -> torch.Tensor:
        """float32 [N, K]."""
        out = torch.zeros(self.positive.shape[1:], device=self.positive.device)
        for positive, scale in zip(self.positive, self.scale, strict=True):
            out += torch.where(positive, scale[:, None], -scale[:, None])
        return out

    def left_of(self, matrix: torch.Tensor) -> torch.Tensor:
        """``matrix - dense()``, float32 [N, K]."""
        out = matrix.clone()
        for rows, planes in zip(pieces(out), self._pieces(out), strict=True):
            rows -= planes.dense()
        return out

    def missed(self, matrix: torch.Tensor) -> float:
        """``||matrix - dense()||^2`` (Frobenius)."""
        both = zip(pieces(matrix), self._pieces(matrix), strict=True)
        return sum(squared_norm(rows - planes.dense()) for rows, planes in both)

    def _pieces(self, matrix: torch.Tensor) -> Iterator["Planes"]:
        """Those of the rows of each of ``pieces(matrix)``."""
        rows = rows_of_piece(matrix)
        scale = self.scale.expand(-1, self.positive.shape[1])
        return map(Planes, self.positive.split(rows, 1), scale.split(rows, 1))


def four_levels(
    sizes: torch.Tensor, rounds: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lloyd's two levels of each row of ``sizes`` >= 0, and which are nearer the high.

    It starts from the levels of a Gaussian, 0.45 and 1.51 standard deviations.
    """
    mean = sizes.mean(dim=1, keepdim=True)
    low, high = 0.57 * mean, 1.89 * mean
    for _ in range(rounds):
        large = sizes > (low + high) / 2
        count, above = (v.sum(dim=1, keepdim=True) for v in (large, sizes * large))
        high = torch.where(count > 0, above / count.clamp_min(1), high)
        rest = (sizes.shape[1] - count).clamp_min(1)
        low = (sizes.sum(dim=1, keepdim=True) - above) / rest
    return low[:, 0], high[:, 0], sizes > (low + high) / 2


class Factors:
    """A low-rank part as it is stored: ``b @ (scale * a)``.

    Attributes:
        a: [R, K] of ``dtype``, integers of four bits as int8.
        b: [N, R] likewise.
        scale: float32 [R] with integers, else None.
        dtype: of the stored factors.
        squares: float64, those of the singular values that it stands for; empty where
            they are not known.
    """

    def __init__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.a, self.b, self.scale, self.dtype = a, b, scale, dtype
        self.squares = torch.empty(0, dtype=torch.float64)

    @classmethod
    def of(
        cls, matrix: torch.Tensor, rank: int, dtype: torch.dtype, refit: bool = True
    ) -> "Factors":
        """The truncated SVD of ``matrix`` (equations 10 to 14), rounded.

        Args:
            matrix: [N, K] float32.
            refit: whether integers are ``refitted`` once.
        """
        b, a = truncated_svd(matrix, rank)
        if dtype.is_floating_point:
            return cls(a.to(dtype), b.to(dtype), None, dtype)
        if not rank:
            return cls(a.to(torch.int8), b.to(torch.int8), a[:, 0].float(), dtype)
        left, left_scale = integers(b.float().T, dtype)
        right, right_scale = integers(a.float(), dtype)
        part = cls(right, left.T, left_scale * right_scale, dtype)
        part = part.refitted(matrix) if refit else part
        part.squares = (b.square().sum(0) * a.square().sum(1)).double()
        return part

    def refitted(self, matrix: torch.Tensor) -> "Factors":
        """Integers that are nearer to ``matrix``, in about the same row space.

        Semantics: ``a = round(argmin ||matrix - b a||)``, then ``b`` likewise from the
        rounded ``a``; each component of each side has a scale.

        Args:
            matrix: [N, K] float32, what this part was fitted to or a similar matrix.
        """
        right, right_scale = integers(least_squares(self.b.float(), matrix), self.dtype)
        left, left_scale = integers(
            least_squares((right * right_scale[:, None]).T, matrix.T), self.dtype
        )
        return Factors(right, left.T, left_scale * right_scale, self.dtype)

    @classmethod
    def in_halves(
        cls, matrix: torch.Tensor, rank: int, dtype: torch.dtype
    ) -> "Factors":
        """Factors of integers: half of the ranks, then the rest of what is missing.

        Semantics: ``first = of(matrix, ceil(rank / 2))``, then
        ``second = of(matrix - first)``, side by side. The second half approximates the
        rounding errors of the largest components, too. All rows of an embedding's
        change share a drift of half of its energy, whose rounding errors exceed what
        the last ranks hold (benchmarks/results/halves.csv).

        Args:
            matrix: [N, K] float32.
            rank: of both together.
            dtype: INT4 or int8.
        """
        first = cls.of(matrix, (rank + 1) // 2, dtype)
        second = cls.of(first.left_of(matrix), rank // 2, dtype)
        scales = [half.scale for half in (first, second) if half.scale is not None]
        a, b = torch.cat((first.a, second.a)), torch.cat((first.b, second.b), dim=1)
        return cls(a, b, torch.cat(scales), dtype)

    def is_of_few_ranks(self, matrix: torch.Tensor, left: torch.Tensor) -> bool:
        """Whether half as many ranks of int8, in the same bytes, would leave less.

        Semantics: ``||left||^2 - (||matrix||^2 - sum s_i^2) > sum_{i > R/2} s_i^2`` for
        the R largest singular values s_i: rounding to INT4 loses more than the last
        half of the ranks holds. At a ratio of 1/8 the left side of the linear layers
        of four full fine-tunes was at most 0.83 of the right one; of 94 in 100 layers
        of a merged LoRA adapter of rank 16 it was larger, up to 19 times.

        Args:
            matrix: [N, K] float32, which this part was fitted to.
            left: what this part leaves of it.
        """
        if self.dtype != INT4 or len(self.squares) < 2:
            return False
        beyond = squared_norm(matrix) - float(self.squares.sum())
        lost = squared_norm(left) - beyond
        return lost > float(self.squares[len(self.squares) // 2 :].sum())

    def dense(self) -> torch.Tensor:
        """float32 [N, K]."""
        a = self.a.float()
        return self.b.float() @ (a if self.scale is None else self.scale[:, None] * a)

    def left_of(self, matrix: torch.Tensor) -> torch.Tensor:
        """``matrix - dense()``, float32 [N, K]."""
        out = self.dense()
        return torch.sub(matrix, out, out=out)


def integers(
    rows: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to integers of INT4 or int8 times a scale.

    Semantics: of a few scales from the largest magnitude downwards, the one with the
    least squared error; integers are symmetric, from -7 or -127 up. 788 rows of
    14336 take 0.06 s, and 0.6 s if they are rounded at once (AMD EPYC, 2 cores).

    Returns:
        int8 [R, K] and float32 [R].
    """
    rounded = [integers_of_some(some, dtype) for some in pieces(rows)]
    values, scales = zip(*rounded, strict=True)
    return torch.cat(values), torch.cat(scales)


def integers_of_some(
    rows: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``integers`` of rows that are rounded at once."""
    largest = 7 if dtype == INT4 else 127
    peak = rows.abs().amax(dim=1, keepdim=True) / largest
    best, scale = torch.zeros_like(rows), torch.ones_like(peak)
    least = rows.square().sum(dim=1, keepdim=True)
    for clip in (1.0, 0.85, 0.72, 0.6, 0.5) if dtype == INT4 else (1.0,):
        step = (clip * peak).clamp_min(torch.finfo(rows.dtype).tiny)
        rounded = (rows / step).round().clamp(-largest, largest)
        error = (rows - rounded * step).square().sum(dim=1, keepdim=True)
        better = error < least
        best = torch.where(better, rounded, best)
        scale = torch.where(better, step, scale)
        least = torch.minimum(error, least)
    return best.to(torch.int8), scale[:, 0]


def least_squares(left: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The X that makes ``left @ X`` nearest to ``matrix``; components of zero stay."""
    gram = left.T @ left
    ridge = 1e-6 * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, left.T @ matrix)


def squared_norm(matrix: torch.Tensor) -> float:
    """``||matrix||^2`` (Frobenius), without a copy of ``matrix``."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def squared_distance(matrix: torch.Tensor, other: torch.Tensor) -> float:
    """``||matrix - other||^2`` (Frobenius), likewise."""
    pairs = zip(pieces(matrix), pieces(other), strict=True)
    return sum(squared_norm(some - others) for some, others in pairs)


def stored(shape: torch.Size, planes: Planes, part: Factors) -> MatrixDelta:
    """Pack both parts."""
    n, k = shape
    a, b = part.a, part.b
    if part.dtype == INT4:
        a, b = pack_int4(a), pack_int4(b)
    words = [pack_signs(positive) for positive in planes.positive]
    empty = planes.positive.new_empty(0, n, words_per_row(k), dtype=torch.int16)
    return MatrixDelta(
        shape=(n, k),
        signs=torch.stack(words) if words else empty,
        scale=planes.scale,
        lora_a=a.contiguous(),
        lora_b=b.contiguous(),
        lora_scale=part.scale,
    )
