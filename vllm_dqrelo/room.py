# SPDX-License-Identifier: Apache-2.0
"""The room of a server for deltas, its default, and the options that give it more."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dqrelo_kernels.table import ALIGNMENT, aligned
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.need import gib, option

TENSORS = 6  # of a matrix at most: signs, scale, factors, their scale, bias


@dataclass(frozen=True)
class Room:
    """What one worker has for deltas.

    Attributes:
        rank: the largest sum of ranks in one layer.
        arena: bytes for resident deltas.
        added_tokens: the most tokens that a delta may add to the vocabulary.
        given: the options that the server was started with.
    """

    rank: int
    arena: int
    added_tokens: int
    given: Mapping[str, Any]

    def check(
        self,
        delta: str,
        rank: int,
        added_tokens: int,
        sizes: Sequence[int],
        least: int | None = None,
    ) -> None:
        """Refuse a delta that does not fit, with the options that make room for it.

        Args:
            delta: its name in the error.
            rank: the largest sum of its ranks in one layer.
            added_tokens: that it adds to the vocabulary.
            sizes: bytes in the arena of the delta, first, and of the largest deltas
                that may share a step with it.
            least: bytes that the delta takes at least, where ``sizes[0]`` is an upper
                bound.

        Raises:
            DqreloError: the delta does not fit.
        """
        needed = sum(map(aligned, sizes))
        surely = (
            needed if least is None else needed - aligned(sizes[0]) + aligned(least)
        )
        problems = []
        if rank > self.rank:
            problems.append(
                f"rank {rank} in one layer, and there is room for {self.rank}"
            )
        if added_tokens > self.added_tokens:
            problems.append(
                f"{added_tokens} tokens added to the vocabulary, and there is room for "
                f"{self.added_tokens}"
            )
        if surely > self.arena:
            problems.append(
                f"{sizes[0]:,} bytes: the {len(sizes)} largest deltas take "
                f"{needed:,} together, and there is room for {self.arena:,}"
            )
        if not problems:
            return
        options = dict(self.given)
        if rank > self.rank:
            options["max_rank"] = rank
        if added_tokens > self.added_tokens:
            options["added_tokens"] = added_tokens
        if needed > self.arena:
            options["delta_memory_gib"] = gib(needed)
        fewer = (
            " (a lower --max-loras takes less memory)" if surely > self.arena else ""
        )
        raise DqreloError(
            f"{delta} does not fit this server: {'; '.join(problems)}. Start it with "
            f"{option(options)}{fewer}"
        )


def typical_rank(sizes: Iterable[int], columns: int) -> int:
    """The sum of the ranks of one layer's matrices, all of ``columns``.

    What factors of 4 bits have in two bits a weight, the default ratio.
    """
    k = columns
    return sum(min(n, k, math.ceil(n * k / 2 / (n + k))) for n in sizes)


def slice_bytes(
    ratio: float, n: int, k: int, whole: tuple[int, int], fully_sharded: bool = False
) -> int:
    """What a delta of one matrix and its bias takes in the arena, at most.

    Args:
        ratio: of the delta.
        n, k: rows and columns that a worker has; k is 0 for a norm of n weights.
        whole: rows and columns of the checkpoint's matrix.
        fully_sharded: whether workers share both factors.
    """
    whole_n, whole_k = whole
    total = aligned(4 * n)  # a bias or a norm in float32
    if not k:
        return total
    size, signs = 2 * ratio * whole_n * whole_k, whole_n * whole_k / 8
    factors = size - signs if size > signs else size
    split = n * k / (whole_n * whole_k)
    held = split if fully_sharded else (n + k) / (whole_n + whole_k)
    total += int((size - factors) * split + factors * held)
    # What rounding a rank up and scales for each row may add.
    return total + 2 * (n + k) + 4 * n + TENSORS * ALIGNMENT
