# SPDX-License-Identifier: Apache-2.0
"""Whether deltas keep their bytes on their way: host, arena, table, and back."""

from typing import TYPE_CHECKING

import torch

from dqrelo_kernels.table import Field, rebase
from vllm_dqrelo.worker.packed import PackedDelta
from vllm_dqrelo.worker.self_check.report import Report

if TYPE_CHECKING:
    from vllm_dqrelo.worker.manager import DeltaManager

# Of a delta: larger than what is copied in one piece.
MOST_BYTES = {"cuda": 160 * 2**20, "cpu": 2**20}


def check_memory(manager: "DeltaManager", report: Report) -> None:
    """Load, evict, restore and move deltas of random bytes, and read them back.

    Args:
        manager: without deltas. Mutated: deltas come and go.
        report: takes the errors. Mutated.
    """
    residency, host = manager.residency, manager.host
    deltas = _random_deltas(manager)
    digests = [delta.digest for delta in deltas]
    for delta in deltas:
        host.put(delta)
    residency.use(digests)
    _read_back(manager, deltas, "after loading", report)
    first = deltas[0]
    host.drop(first.digest)
    residency.evict(first.digest)
    report.same("memory", host.get(first.digest).extent, first.extent, "after evicting")
    residency.use(digests)
    _read_back(manager, deltas, "after restoring", report)
    manager.forget(first.digest)
    residency.compact()
    _read_back(manager, deltas[1:], "after compaction", report)
    for delta in deltas[1:]:
        manager.forget(delta.digest)


def _random_deltas(manager: "DeltaManager") -> list[PackedDelta]:
    count = min(3, manager.memory.slots)
    most = min(manager.memory.arena // 4, MOST_BYTES[manager.device.type])
    shape = manager.sites.count, len(Field)
    generator = torch.Generator().manual_seed(0)
    deltas = []
    for i in range(count):
        size = max(0, most - 64 * i - 5)
        bytes_ = torch.randint(256, (size,), dtype=torch.uint8, generator=generator)
        entries = torch.randint(2**40, shape, generator=generator)
        deltas.append(PackedDelta(f"self-check {i}", bytes_, entries))
    return deltas


def _read_back(
    manager: "DeltaManager", deltas: list[PackedDelta], when: str, report: Report
) -> None:
    residency = manager.residency
    for delta in deltas:
        found = residency.resident[delta.digest]
        extent = residency.arena.data[found.offset : found.offset + delta.size]
        report.same("memory", extent.cpu(), delta.extent, f"arena {when}")
        entries = rebase(delta.entries, found.offset)
        for site in manager.sites.by_name.values():
            mine = entries[site.first : site.first + len(site.sizes)]
            table = residency.table(site)[found.slot].cpu()
            report.same("memory", table, mine, f"table of {site.name} {when}")
