# SPDX-License-Identifier: Apache-2.0
"""Copies through two buffers, with streams that run as late as they may."""

import random
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.deltas import DEVICE, HAS_DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dqrelo_kernels.table import ABSENT, Field, aligned, empty_table, rebase

pytest.importorskip("vllm")

from vllm_dqrelo.worker import staging
from vllm_dqrelo.worker.host import HostTier
from vllm_dqrelo.worker.packed import PackedDelta
from vllm_dqrelo.worker.residency import Residency

PIECE, CPU = 1000, torch.device("cpu")


class Stream:
    """Runs its work when somebody waits for it, and not before."""

    def __init__(self, device=None):
        self.work = []

    def wait_stream(self, other):
        self.work += [(other.run, len(other.work))]

    def run(self, count=None):
        """The first pieces of work, or all, that are not done yet."""
        for i, item in enumerate(self.work[:count]):
            self.work[i] = None
            if item:
                function, *arguments = item
                function(*arguments)


class Prompt(Stream):
    """Waits at once for another: all its own work is done when it is asked for."""

    def wait_stream(self, other):
        other.run()


class Event:
    def __init__(self, streams):
        self._streams, self._recorded = streams, None

    def record(self):
        stream = self._streams.current
        self._recorded = stream, len(stream.work)

    def synchronize(self):
        if self._recorded:
            stream, count = self._recorded
            stream.run(count)


class Streams:
    """What is used of torch.cuda."""

    Stream = Stream

    def __init__(self):
        self.main = self.current = Stream()

    def Event(self):
        return Event(self)

    def current_stream(self):
        return self.current

    @contextmanager
    def stream(self, stream):
        self.current, before = stream, self.current
        yield
        self.current = before


@pytest.fixture
def streams(monkeypatch):
    """Copies that need not be waited for are work of the current stream."""
    streams, copy_ = Streams(), torch.Tensor.copy_

    def copy(self, source, non_blocking=False):
        if not non_blocking:
            return copy_(self, source)
        streams.current.work.append((copy_, self, source, True))
        return self

    monkeypatch.setattr(staging, "PIECE", PIECE)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    return streams


class Mixed(TorchDispatchMode):
    """Refuses operators of both host and device, but copies that nobody waits for.

    Args:
        device: tensors in the memory of the device. Others are in that of the host.
    """

    def __init__(self, device):
        super().__init__()
        self.device = device

    @staticmethod
    def _address(tensor):
        return tensor.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [
            x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        ]
        device = set(map(self._address, self.device))
        places = {self._address(x) in device for x in tensors if x.numel()}
        late = func is torch.ops.aten.copy_.default and args[2:] == (True,)
        number = func._opname == "fill_"
        assert len(places) < 2 or late or number, func
        return func(*args, **(kwargs or {}))


def some_bytes(size):
    return torch.randint(256, (size,), dtype=torch.uint8)


SIZES = [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 7 * PIECE + 3]


@pytest.mark.parametrize("size", SIZES)
def test_bytes_there_and_back(streams, size):
    copies = staging.Staging(CPU, streams)
    device, seen = [some_bytes(size) for _ in range(3)], []
    before = [extent.clone() for extent in device]
    # A step that still reads what the writes below replace.
    streams.main.work.append((lambda: seen.extend(e.clone() for e in device),))
    written = [some_bytes(size) for _ in device]
    for extent, data in zip(device, written, strict=True):
        given = data.clone()
        copies.write(extent, given)
        given.zero_()
    back = torch.empty(size, dtype=torch.uint8)
    copies.read(back, device[1])
    assert torch.equal(back, written[1])
    streams.main.run()  # the step that the writes are for
    for got, old, new, extent in zip(seen, before, written, device, strict=True):
        assert torch.equal(got, old) and torch.equal(extent, new)


def test_the_host_does_not_wait_for_a_write(streams):
    """Of one that the buffers hold."""
    extent = torch.zeros(2 * PIECE, dtype=torch.uint8)
    copies = staging.Staging(CPU, streams)
    copies.write(extent, torch.ones_like(extent))
    assert not extent.any()
    streams.main.run()
    assert extent.all()


def test_small_tensors_are_copied_from_pinned_memory(streams, monkeypatch):
    """Which torch keeps until they are copied: they need not be waited for."""
    copies, calls, tensor = staging.Staging(CPU, streams), [], torch.arange(5)
    copies._pinned = True

    def to(self, *arguments, **options):
        calls.append((self, *arguments, options))
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    monkeypatch.setattr(torch.Tensor, "to", to)
    copies.on_device(tensor)
    ((pinned, device, options),) = calls
    assert pinned.tolist() == [1, 2, 3, 4, 5]
    assert device == CPU and options == {"non_blocking": True}


def test_a_cpu_has_no_buffers():
    copies, tensor = staging.Staging(CPU), torch.arange(5)
    assert copies.on_device(tensor) is tensor and not hasattr(copies, "_buffers")


class Deltas:
    """A residency with room for some of six deltas, and on the host for fewer."""

    def __init__(self, device):
        site = SimpleNamespace(name="head", sizes=(10, 4), first=0, columns=6)
        site.module = torch.nn.Linear(6, 10)
        sites = SimpleNamespace(
            by_name={"head": site}, count=2, tokens=10, added_here=lambda site: range(2)
        )
        self.site, self.draw, self.deltas = site, random.Random(0), {}
        host = HostTier(2 * PIECE)
        for i in range(6):
            extent = some_bytes(self.draw.randint(1, 3 * PIECE))
            entries = empty_table(1, 2, "cpu")[0]
            entries[0, Field.SIGNS], entries[1, Field.RANK_A] = 64 * i, i
            added = {"head": torch.randn(i % 3, 6)}
            delta = PackedDelta(str(i), extent, entries, added, 10 + i % 3)
            self.deltas[str(i)] = delta
            host.put(delta)
        # Just as many bytes as two deltas may take, so that the arena is compacted.
        sizes = sorted(aligned(delta.size) for delta in self.deltas.values())
        self.residency = Residency(sites, sum(sizes[-2:]), 4, host, device)

    def come_and_go(self, within=nullcontext):
        """The device has what each delta of random steps is made of.

        Args:
            within: a context for what a step does.
        """
        residency, table = self.residency, self.residency.table(self.site)
        for _ in range(60):
            chosen = self.draw.sample(list(self.deltas), self.draw.choice((1, 2, 2)))
            with within():
                slots = residency.use(chosen)
            for digest, slot in slots.items():
                delta, at = self.deltas[digest], residency.resident[digest].offset
                data = residency.arena.data[at : at + delta.size].cpu()
                assert torch.equal(data, delta.extent)
                assert torch.equal(table[slot].cpu(), rebase(delta.entries, at))
                rows, added = residency.added["head"].rows[slot], delta.added["head"]
                assert torch.equal(rows[: len(added)].cpu(), added)
                assert not rows[len(added) :].any()
                assert residency.vocabularies.sizes[slot] == delta.vocab_size
            free = set(range(4)) - {one.slot for one in residency.resident.values()}
            assert (table[sorted(free)] == ABSENT).all()
        assert residency.evicted > 20


def test_deltas_come_and_go_on_a_cpu():
    Deltas(CPU).come_and_go()


def test_deltas_come_and_go(streams, monkeypatch):
    """Evicted deltas are read back. Nothing else waits for the device."""
    streams.main = streams.current = Prompt()
    monkeypatch.setattr(
        "vllm_dqrelo.worker.residency.Staging",
        lambda device: staging.Staging(device, streams),
    )
    deltas, calls = Deltas(CPU), []
    residency, (added,) = deltas.residency, deltas.residency.added.values()
    mixed = Mixed(
        [residency.arena.data, residency.arena._bounce, residency._table]
        + [residency._rows, added.rows, residency.vocabularies.sizes]
    )
    on_device, read = residency.staging.on_device, residency.staging.read

    def moved(tensor):
        mixed.device.append(on_device(tensor).clone())  # which keeps its address
        return mixed.device[-1]

    def counted(*arguments):
        calls.append(arguments)
        read(*arguments)

    monkeypatch.setattr(residency.staging, "on_device", moved)
    monkeypatch.setattr(residency.staging, "read", counted)
    deltas.come_and_go(lambda: mixed)
    assert len(calls) > 10


@contextmanager
def without_waiting():
    """Within it torch refuses to wait for a GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


ON_A_GPU = pytest.mark.skipif(not HAS_DEVICE, reason="needs a CUDA device")


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("size", [1, staging.PIECE, 5 * staging.PIECE // 2])
def test_bytes_there_and_back_on_a_gpu(size):
    """The host passes a write while a kernel still runs."""
    device, data = torch.device(DEVICE), some_bytes(size)
    copies, left = staging.Staging(device), some_bytes(size).to(device)
    extent = torch.zeros_like(left)
    with without_waiting():
        torch.cuda._sleep(10**8)
        extent.copy_(left)
        copies.write(extent, data)
        after, small = extent.clone(), copies.on_device(data[:100].clone())
    assert torch.equal(after.cpu(), data) and torch.equal(small.cpu(), data[:100])
    back = torch.empty_like(data)
    copies.read(back, extent)
    assert torch.equal(back, data)


@pytest.mark.gpu
@ON_A_GPU
def test_deltas_come_and_go_on_a_gpu():
    Deltas(torch.device(DEVICE)).come_and_go(without_waiting)
