# SPDX-License-Identifier: Apache-2.0
"""What a server has for deltas, and the options that give it more."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dqrelo_kernels.table import aligned
from vllm_dqrelo.format.errors import DqreloError


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
        """Refuse what has no room, with the options that make room for all of it.

        Args:
            delta: what it is called in the error.
            rank: the largest sum of its ranks in one layer.
            added_tokens: that it adds to the vocabulary.
            sizes: bytes in the arena of the delta, first, and of the largest deltas
                that one step may have beside it.
            least: bytes that the delta takes at least, where ``sizes[0]`` is an upper
                bound.

        Raises:
            DqreloError: there is too little room.
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


def gib(size: int) -> float:
    """Bytes as a number of GiB, rounded up to a whole MiB."""
    return math.ceil(size / 2**20) / 1024


def option(options: Mapping[str, Any]) -> str:
    """How ``vllm serve`` is given dqrelo's options."""
    return f"--additional-config '{json.dumps({'dqrelo': options})}'"
