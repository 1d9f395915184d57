# SPDX-License-Identifier: Apache-2.0
"""Deltas in host memory, and the one thread that reads them from disk."""

import ctypes
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.worker.packed import PackedDelta

logger = init_logger(f"vllm.{__name__}")


class HostTier:
    """Packed deltas by digest, the least recently used first.

    Only ``trim`` makes a delta disappear from memory, and it is told what must stay.

    Args:
        limit: bytes that ``trim`` leaves at most, unless more must stay.

    Attributes:
        packed: digest -> delta.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.packed: OrderedDict[str, PackedDelta] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self.packed

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(packed.size for packed in self.packed.values())

    def get(self, digest: str) -> PackedDelta:
        """A delta that is here, from now on the last one used."""
        self.packed.move_to_end(digest)
        return self.packed[digest]

    def put(self, packed: PackedDelta) -> None:
        """Add a delta, or count it as used."""
        self.packed.setdefault(packed.digest, packed)
        self.packed.move_to_end(packed.digest)

    def drop(self, digest: str) -> None:
        """Forget a delta, if it is here."""
        self.packed.pop(digest, None)

    def clear(self) -> None:
        """Forget all of them."""
        self.packed.clear()

    def shed(self, resident: Collection[str]) -> None:
        """Drop deltas that the device has, too, until the limit is kept.

        They come back when they are evicted there.
        """
        self._drop_until([digest for digest in self.packed if digest in resident])

    def trim(self, keep: Collection[str], resident: Collection[str]) -> list[str]:
        """Drop deltas until the limit is kept.

        Args:
            keep: digests of deltas that must not disappear.
            resident: digests of deltas that the device has.

        Returns:
            The digests of those that are gone from memory altogether.
        """
        self.shed(resident)
        return self._drop_until(
            [
                digest
                for digest in self.packed
                if digest not in resident and digest not in keep
            ]
        )

    def _drop_until(self, digests: list[str]) -> list[str]:
        """Those of ``digests`` that had to be dropped for the limit."""
        size, dropped = self.size, []
        for digest in digests:
            if size <= self.limit:
                break
            size -= self.packed.pop(digest).size
            dropped.append(digest)
        return dropped


class Loaded(NamedTuple):
    """How a load ended: ``error`` is empty, or else the rest is.

    Attributes:
        digest: of the delta.
        size: bytes that it takes in the arena.
        seconds: that it took to read.
        error: why it cannot be served, for the user.
        missing: whether that is because there is no such folder.
        elsewhere: its parameters that this worker has no place for.
    """

    digest: str
    size: int
    seconds: float = 0.0
    error: str = ""
    missing: bool = False
    elsewhere: frozenset[str] = frozenset()


def agreed(loads: Sequence[Loaded], folder: str) -> Loaded:
    """How a load ended that each worker made: what fails in one fails in all.

    A parameter that no worker has a place for fails, too.
    """
    if failed := next((loaded for loaded in loads if loaded.error), None):
        return failed
    first = loads[0]
    if any(loaded.digest != first.digest for loaded in loads):
        return Loaded("", 0, error=f"{first.digest} was replaced while it was read")
    if nowhere := frozenset.intersection(*(loaded.elsewhere for loaded in loads)):
        problems = [f"  {name}: the model has no place for it" for name in nowhere]
        subject = f"{folder} does not fit the served model:"
        return Loaded("", 0, error="\n".join([subject, *sorted(problems)]))
    return first._replace(size=max(loaded.size for loaded in loads))


class Loader:
    """Reads one delta after another in a thread of its own.

    Args:
        read: reads, checks and packs a delta; all of its exceptions are results.
    """

    def __init__(
        self, read: Callable[[LoRARequest, Mapping[str, int]], PackedDelta]
    ) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, "dqrelo-loader", _without_helpers)
        self._running: Future[tuple[PackedDelta, float]] | None = None

    def start(self, request: LoRARequest, others: Mapping[str, int]) -> None:
        """Begin to read a delta; the one before was taken."""
        self._running = self._thread.submit(self._timed, request, others)

    def _timed(
        self, request: LoRARequest, others: Mapping[str, int]
    ) -> tuple[PackedDelta, float]:
        start = time.monotonic()
        return self._read(request, others), time.monotonic() - start

    @property
    def done(self) -> bool:
        """Whether ``take`` would not wait."""
        return self._running is not None and self._running.done()

    def take(self) -> tuple[Loaded, PackedDelta | None]:
        """What became of the delta that was read."""
        running, self._running = self._running, None
        assert running is not None
        try:
            packed, seconds = running.result()
        except FileNotFoundError as error:
            return Loaded("", 0, error=str(error), missing=True), None
        except DqreloError as error:
            return Loaded("", 0, error=str(error)), None
        except Exception as error:
            logger.exception("dqrelo: a delta could not be read")
            return Loaded("", 0, error=f"{type(error).__name__}: {error}"), None
        loaded = Loaded(packed.digest, packed.size, seconds, elsewhere=packed.elsewhere)
        return loaded, packed


def _without_helpers() -> None:
    """Let torch compute in the calling thread alone.

    OpenMP would start helpers for it and keep them. With more threads than cores they
    no longer wait for each other awake, which made every later step of an engine 1.7
    times as long (GNU OpenMP, two cores, AMD EPYC).
    """
    torch.get_num_threads()  # in a new thread torch sets the number in its first call
    ctypes.CDLL(None).omp_set_num_threads(1)  # torch.set_num_threads is for all threads
