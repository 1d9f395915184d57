# SPDX-License-Identifier: Apache-2.0
"""What a worker tells the engine: its memory for deltas, and how a load ended.

``worker/calls.py`` has the calls that these values answer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Memory(NamedTuple):
    """The memory of a worker for deltas, in bytes.

    Attributes:
        base: of the model's weights, in all workers.
        arena: for resident deltas.
        host: for deltas in host memory.
        typical: of a delta of ratio 1/8.
        slots: the most deltas that are resident, a number.
        rank: the largest sum of ranks in one layer, a number.
    """

    base: int
    arena: int
    host: int
    typical: int
    slots: int
    rank: int


class Usage(NamedTuple):
    """The memory that a worker's deltas take now, in bytes.

    Attributes:
        resident: digests of the deltas on the device.
        device: of the deltas there.
        host: of the deltas in host memory.
        evicted: how many made room for others on the device so far, a number.
    """

    resident: frozenset[str] = frozenset()
    device: int = 0
    host: int = 0
    evicted: int = 0


class Loaded(NamedTuple):
    """A delta that a worker has read.

    Attributes:
        digest: of the delta.
        size: bytes that it takes in the arena.
        seconds: that it took to read.
        elsewhere: its parameters that this worker has no place for.
    """

    digest: str
    size: int
    seconds: float = 0.0
    elsewhere: frozenset[str] = frozenset()


class Refused(NamedTuple):
    """Why a delta cannot be served, for the user.

    Attributes:
        missing: whether its folder is not there.
    """

    error: str
    missing: bool = False


def agreed(loads: Sequence[Loaded | Refused], folder: Path) -> Loaded | Refused:
    """How a load ended that each worker made: what fails in one worker fails in all.

    A parameter that no worker has a place for fails, too.
    """
    loaded = []
    for load in loads:
        if isinstance(load, Refused):
            return load
        loaded.append(load)
    first = loaded[0]
    if any(load.digest != first.digest for load in loaded):
        return Refused(f"{first.digest} was replaced while it was read")
    if nowhere := frozenset.intersection(*(load.elsewhere for load in loaded)):
        problems = [f"  {name} is not a parameter of the model" for name in nowhere]
        subject = f"{folder} does not fit the served model:"
        return Refused("\n".join([subject, *sorted(problems)]))
    return first._replace(size=max(load.size for load in loaded))
