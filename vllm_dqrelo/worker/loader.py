# SPDX-License-Identifier: Apache-2.0
"""The one thread of a worker that reads deltas from disk."""

import ctypes
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.messages.load import Loaded, Refused
from vllm_dqrelo.worker.packed import PackedDelta

logger = init_logger(f"vllm.{__name__}")


class Loader:
    """Reads one delta after another in a thread of its own.

    Args:
        read: reads, checks and packs a delta; each of its exceptions is a result.
    """

    def __init__(
        self, read: Callable[[LoRARequest, Mapping[str, int]], PackedDelta]
    ) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, "dqrelo-loader", _without_helpers)
        self._running: Future[tuple[PackedDelta, float]] | None = None

    def start(self, request: LoRARequest, others: Mapping[str, int]) -> None:
        """Begin to read a delta, after ``take`` has returned the last one."""
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

    def take(self) -> tuple[Loaded | Refused, PackedDelta | None]:
        """How the load ended, and the delta that was read."""
        running, self._running = self._running, None
        assert running is not None
        try:
            packed, seconds = running.result()
        except FileNotFoundError as error:
            return Refused(str(error), missing=True), None
        except DqreloError as error:
            return Refused(str(error)), None
        except Exception as error:
            logger.exception("dqrelo: a delta could not be read")
            return Refused(f"{type(error).__name__}: {error}"), None
        return Loaded(packed.digest, packed.size, seconds, packed.elsewhere), packed


def _without_helpers() -> None:
    """Let torch compute in the calling thread alone.

    OpenMP would start helpers for it and keep them. With more threads than cores they
    no longer wait for each other awake, which made every later step of an engine 1.7
    times as long (GNU OpenMP, two cores, AMD EPYC).
    """
    torch.get_num_threads()  # in a new thread torch sets the number in its first call
    ctypes.CDLL(None).omp_set_num_threads(1)  # torch.set_num_threads is for all threads
