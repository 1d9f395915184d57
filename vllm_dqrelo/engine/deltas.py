# SPDX-License-Identifier: Apache-2.0
"""An engine's deltas: what clients call them, what they are, whether they are loaded.

A client names a delta by the id and the path of a LoRARequest. Tomorrow the id or the
path may have another content. So nothing in the engine is keyed by an id or a path: a
request is *bound* to a digest when it enters, and keeps the digest. In a bound
LoRARequest the name is the digest, the id is a number that belongs to this digest
alone, and the path is the folder with the digest. So vLLM's key of cached prefixes, its
count of distinct adapters in a step and every mapping of the worker are by content, and
two names of one content share everything.
"""

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from dqrelo_kernels.table import aligned
from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.messages.load import Loaded, Memory, Refused, Usage, agreed
from vllm_dqrelo.messages.report import Report
from vllm_dqrelo.messages.request import (
    Bound,
    folder_of,
    path_with_digest,
    split_path,
)

logger = init_logger(f"vllm.{__name__}")

POLL = 0.002  # seconds, of an engine that has nothing to do but wait for a load


class Registered(NamedTuple):
    """A name of a delta: the path that the client gave, and the bound request."""

    path: str
    bound: Bound


class Load(NamedTuple):
    """A delta that is read, for a client that registers it (future) or for requests."""

    request: LoRARequest
    future: Future[bool] | None


class Failure(NamedTuple):
    """A delta that cannot be served, and why."""

    digest: str
    error: str


class Deltas:
    """The deltas of one engine.

    The engine's loop never waits for a disk: the workers read, and ``advance`` asks
    whether the workers have read. One delta is read at a time: first the deltas that
    clients register, then those that requests wait for, in the order of the queue.

    Args:
        executor: vLLM's executor, which calls the workers.
        max_loras: the most deltas in one step.
    """

    def __init__(self, executor: Any, max_loras: int) -> None:
        self._rpc = executor.collective_rpc
        self._max_loras = max_loras
        # What each worker has at least.
        self.memory = Memory(*map(min, zip(*self._rpc("start_deltas"), strict=True)))
        self.registered: dict[int, Registered] = {}  # by the client's id
        self.users: Counter[str] = Counter()  # unfinished requests
        self.pinned: set[str] = set()
        self.sizes: dict[str, int] = {}  # of what was admitted
        self.ready: set[str] = set()  # in memory, of the host or the device
        self.usage = Usage()
        self.changed = True  # whether ``usage`` may be out of date
        self.report = Report()
        self._numbers: dict[str, int] = {}
        self._count = count(1)
        self._registrations: deque[Load] = deque()
        self._load: Load | None = None

    # What a client asks for; the names are those of vLLM's EngineCore.

    def add_lora(self, lora_request: LoRARequest) -> Future[bool]:
        """Register a delta, after the workers have read and checked it.

        Returns:
            Whether the delta was new, or the error why it cannot be served.
        """
        future: Future[bool] = Future()
        known = self.registered.get(lora_request.lora_int_id)
        if (
            known
            and known.path == lora_request.lora_path
            and known.bound.lora_name in self.sizes
            and not lora_request.load_inplace
        ):
            future.set_result(False)
        else:
            self._registrations.append(Load(lora_request, future))
        return future

    def wait_for(self, future: Future[bool]) -> bool:
        """The result of ``add_lora``, in an engine without a loop of its own."""
        while not future.done():
            self.advance(self.users, ())
            time.sleep(POLL)
        return future.result()

    def remove_lora(self, lora_id: int) -> bool:
        """Forget a name; the delta is freed when its last request ends."""
        known = self.registered.pop(lora_id, None)
        if known:
            self.changed = True  # also where another name keeps the delta
            self._forget_unused(known.bound.lora_name)
        return known is not None

    def list_loras(self) -> set[int]:
        """The ids that clients gave."""
        return set(self.registered)

    def pin_lora(self, lora_id: int) -> bool:
        """Keep a delta in memory for as long as it is registered."""
        if lora_id not in self.registered:
            raise ValueError(f"cannot pin {lora_id}: not the id of a delta")
        digest = self.registered[lora_id].bound.lora_name
        self.pinned.add(digest)
        self._rpc("pin_delta", args=(digest,))
        return True

    def bind(self, request: LoRARequest) -> Bound:
        """The request that the engine keeps for a client's; see the top of this file.

        Raises:
            FileNotFoundError, DqreloError: the id is not registered, and the path is
                not a delta folder.
        """
        known = self.registered.get(request.lora_int_id)
        if known and known.path == request.lora_path:
            return known.bound
        folder, digest = split_path(request.lora_path)
        digest = digest or DeltaConfig.read(folder).digest
        bound = self._bound(folder, digest, request.lora_name)
        # As in vLLM, using an adapter is a way to load it.
        self.registered.setdefault(
            request.lora_int_id, Registered(request.lora_path, bound)
        )
        return bound

    def _bound(self, folder: Path, digest: str, model: str) -> Bound:
        number = self._numbers.setdefault(digest, next(self._count))
        return Bound(digest, number, path_with_digest(folder, digest), model=model)

    # What the scheduler says and asks.

    def use(self, bound: LoRARequest) -> None:
        """A request for a delta has come."""
        self.users[bound.lora_name] += 1

    def release(self, bound: LoRARequest) -> None:
        """It has ended."""
        self.users[bound.lora_name] -= 1
        if not self.users[bound.lora_name]:
            del self.users[bound.lora_name]
            self._forget_unused(bound.lora_name)

    @property
    def loading(self) -> bool:
        """Whether there is something to read that no request waits for."""
        return bool(
            self._load or self._registrations or not self.ready.issuperset(self.pinned)
        )

    @property
    def busy(self) -> bool:
        """Whether ``advance`` has something to do."""
        return self.loading or not self.ready.issuperset(self.users)

    def advance(
        self, started: Iterable[str], waiting: Iterable[LoRARequest]
    ) -> Failure | None:
        """Begin the next load, or finish the one that was read.

        Args:
            started: digests of the deltas of requests that run or have run.
            waiting: of the other requests, in the order of the queue.

        Returns:
            The delta whose requests fail.
        """
        ahead = self.pinned.union(started)
        missing = None
        for request in waiting:
            if request.lora_name not in self.ready:
                missing = request
                break
            ahead.add(request.lora_name)
        if self._load is None:
            self._start(ahead, missing)
        elif all(self._rpc("delta_load_done")):
            load, self._load = self._load, None
            return self._finish(load, ahead)
        return None

    def _start(self, ahead: set[str], missing: LoRARequest | None) -> None:
        """Begin a load; ``ahead`` is what comes before ``missing``."""
        if self._registrations:
            self._load = self._registrations.popleft()
        elif missing:
            needed = [*ahead & self.ready, missing.lora_name]
            size = sum(self.sizes.get(digest, 0) for digest in needed)
            # Beyond the limit only what one step needs: requests that came earlier
            # end, and so no delta waits for ever.
            if size > self.memory.host and len(ahead - self.pinned) > self._max_loras:
                return
            self._load = Load(missing, None)
        else:
            unread = (
                known.bound
                for known in list(self.registered.values())
                if known.bound.lora_name in self.pinned - self.ready
            )
            if (bound := next(unread, None)) is None:
                return
            self._load = Load(bound, None)
        load = self._load
        self._rpc("start_delta_load", args=(load.request, self._beside(load)))

    def _finish(self, load: Load, ahead: set[str]) -> Failure | None:
        """Take what was read, and answer those who wait for it."""
        users = self.users.keys() if load.future else {load.request.lora_name}
        loads, dropped = zip(
            *self._rpc("finish_delta_load", args=(ahead | users,)), strict=True
        )
        gone = set(chain(*dropped))
        self.changed = True
        self.report.dropped += len(gone)
        self.ready.difference_update(gone)
        result = agreed(loads, folder_of(load.request))
        if isinstance(result, Loaded):
            if result.digest not in gone:
                self.ready.add(result.digest)
            self._admit(load, result)
            return None
        read = {one.digest for one in loads if isinstance(one, Loaded)}
        for digest in read - self.sizes.keys():
            self._rpc("forget_delta", args=(digest,))
        return self._refuse(load, result)

    def _admit(self, load: Load, loaded: Loaded) -> None:
        """All workers have a delta."""
        self.report.loads.append(loaded.seconds)
        self.sizes[loaded.digest] = loaded.size
        if load.future:
            self._register(load.request, loaded)
            load.future.set_result(True)
        self._forget_unused(loaded.digest)

    def _refuse(self, load: Load, refused: Refused) -> Failure | None:
        """A worker cannot serve a delta: tell the client, or let its requests fail."""
        request, future = load
        self.report.failed_loads += 1
        if future is None:
            return self._fail(request.lora_name, refused.error)
        future.set_exception(
            LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
            if refused.missing
            else DqreloError(refused.error)
        )
        return None

    def _beside(self, load: Load) -> dict[str, int]:
        """Digest -> bytes of the largest deltas that may share a step with a load's."""
        replaced = load.request.lora_int_id if load.future else None
        others = self._named(but=replaced) | self.users.keys()
        sizes = [(size, digest) for digest, size in self.sizes.items()]
        known = sorted((pair for pair in sizes if pair[1] in others), reverse=True)
        return {digest: size for size, digest in known[: self._max_loras]}

    def _register(self, request: LoRARequest, loaded: Loaded) -> None:
        """A name means this delta from now on."""
        bound = self._bound(folder_of(request), loaded.digest, request.lora_name)
        before = self.registered.get(request.lora_int_id)
        self.registered[request.lora_int_id] = Registered(request.lora_path, bound)
        if before:
            self._forget_unused(before.bound.lora_name)
        logger.info(
            "dqrelo: delta %s registered, %.1f MB, %s; the arena has room for %d such",
            request.lora_name,
            loaded.size / 1e6,
            loaded.digest,
            self.memory.arena // max(aligned(loaded.size), 1),
        )

    def _fail(self, digest: str, error: str) -> Failure:
        """A delta that requests wait for cannot be read."""
        logger.error("dqrelo: %s", error)
        if digest not in self.sizes:  # it never was: the next request looks again
            for lora_id, known in list(self.registered.items()):
                if known.bound.lora_name == digest:
                    del self.registered[lora_id]
        self.pinned.discard(digest)
        return Failure(digest, error)

    def _forget_unused(self, digest: str) -> None:
        """Free a delta that has neither a name nor a request."""
        if digest in self._named() or digest in self.users:
            return
        self.sizes.pop(digest, None)
        self.pinned.discard(digest)
        self.ready.discard(digest)
        self._rpc("forget_delta", args=(digest,))
        self.changed = True

    # Metrics.

    def look(self) -> None:
        """Ask a worker what its deltas take, if that may have changed."""
        if self.changed:
            before, self.usage = self.usage, self._rpc("delta_usage")[0]
            self.report.evicted += self.usage.evicted - before.evicted
            self.changed = False

    def ran(self, rows: Mapping[str, int]) -> None:
        """A step was scheduled with so many rows of each delta."""
        self.report.steps.append((sum(rows.values()), len(rows)))
        self.changed |= not self.usage.resident.issuperset(rows)

    def take_report(self) -> Report:
        """The present state, and the events since the last call."""
        report, self.report = self.report, Report()
        report.registered = len(self.registered)
        report.resident = len(self.usage.resident)
        report.device_bytes, report.host_bytes = self.usage.device, self.usage.host
        report.device_limit, report.host_limit = self.memory.arena, self.memory.host
        return report

    def _named(self, but: int | None = None) -> set[str]:
        """The deltas that have a name, other than that of one id."""
        # A copy at once: another thread may be binding a request.
        registered = list(self.registered.items())
        return {known.bound.lora_name for key, known in registered if key != but}
