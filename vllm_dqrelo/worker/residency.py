# SPDX-License-Identifier: Apache-2.0
"""Which deltas are on the device, and where."""

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch

from dqrelo_kernels.table import ABSENT, SiteDeltas, empty_table, rebase
from vllm_dqrelo.worker.arena import Arena
from vllm_dqrelo.worker.host import HostTier
from vllm_dqrelo.worker.packed import PackedDelta
from vllm_dqrelo.worker.sites import Site, Sites
from vllm_dqrelo.worker.staging import Staging
from vllm_dqrelo.worker.vocabulary import AddedRows, Vocabularies


@dataclass
class _Resident:
    """A delta on the device: its slot and its extent.

    ``packed`` is the delta without its bytes, which the arena has.
    """

    slot: int
    offset: int
    size: int
    packed: PackedDelta


class Residency:
    """The arena and the table: one extent and one slot for each resident delta.

    Args:
        sites: of the model.
        size: bytes of the arena.
        slots: how many deltas can be resident.
        host: where deltas come from, and where they go back to.
        device: of the model.

    Attributes:
        resident: digest -> delta, the least recently used first.
        added: site -> the rows of tokens that are not the base's.
        vocabularies: which tokens each resident delta's model has.
        evicted: how many deltas made room for others so far.
    """

    def __init__(
        self,
        sites: Sites,
        size: int,
        slots: int,
        host: HostTier,
        device: torch.device,
    ) -> None:
        self.arena = Arena(size, device)
        self.staging = Staging(device)
        self.host = host
        self.resident: OrderedDict[str, _Resident] = OrderedDict()
        self.evicted = 0
        self._free = list(reversed(range(slots)))
        # The tables of all sites follow one another: each is contiguous.
        self._table = empty_table(1, slots * sites.count, device)[0]
        rows_of_slots = torch.empty(slots, sites.count, dtype=torch.int64)
        self._sites: dict[str, torch.Tensor] = {}
        for site in sites.by_name.values():
            slices, start = len(site.sizes), slots * site.first
            rows = torch.arange(start, start + slots * slices).view(slots, slices)
            rows_of_slots[:, site.first : site.first + slices] = rows
            table = self._table[start : start + slots * slices]
            self._sites[site.name] = table.view(slots, slices, -1)
        self._rows = rows_of_slots.to(device)
        self.added = {
            name: AddedRows(
                site.sizes[0],
                slots,
                (len(tokens), site.columns),
                site.module.get_parameter("weight").dtype,
                device,
            )
            for name, site in sites.by_name.items()
            if (tokens := sites.added_here(site))
        }
        self.vocabularies = Vocabularies(sites.tokens, slots, device)

    def table(self, site: Site) -> torch.Tensor:
        """int64 [slots, slices, Field] of one site; never moves."""
        return self._sites[site.name]

    def deltas(self, site: Site) -> SiteDeltas:
        """What the layer of a site passes to its ops; never moves."""
        device = self.arena.data.device
        return SiteDeltas(self.arena.data, self.table(site), site.slices(device))

    def use(self, digests: Collection[str]) -> dict[str, int]:
        """Make deltas resident together.

        Each is resident or in host memory, and they fit the arena together; both were
        checked before the step.

        Returns:
            digest -> slot.
        """
        for digest in digests:
            if digest in self.resident:
                self.resident.move_to_end(digest)
        for digest in digests:
            if digest not in self.resident:
                self._activate(self.host.get(digest), keep=digests)
                self.host.shed(self.resident)
        return {digest: self.resident[digest].slot for digest in digests}

    def _activate(self, packed: PackedDelta, keep: Collection[str]) -> None:
        """Copy a delta into the arena; the least recently used make room."""
        evictable = [digest for digest in self.resident if digest not in keep]
        compacted = False
        while (
            not self._free
            or (offset := self.arena.allocate(packed.digest, packed.size)) is None
        ):
            if evictable:
                self.evict(evictable.pop(0))
            elif compacted:
                raise RuntimeError("a step has more deltas than fit the arena")
            else:
                self.compact()
                compacted = True
        extent = self.arena.data[offset : offset + packed.size]
        self.staging.write(extent, packed.extent)
        rest = replace(packed, extent=packed.extent[:0].clone())
        delta = _Resident(self._free.pop(), offset, packed.size, rest)
        self.resident[packed.digest] = delta
        self._write_table(delta)
        for name, rows in self.added.items():
            added = packed.added.get(name)
            rows.set(
                delta.slot, None if added is None else self.staging.on_device(added)
            )
        self.vocabularies.set(delta.slot, packed.vocab_size)

    def evict(self, digest: str) -> None:
        """Evict a delta from the device to host memory."""
        if digest not in self.host:
            delta = self.resident[digest]
            extent = torch.empty(delta.size, dtype=torch.uint8)
            there = self.arena.data[delta.offset : delta.offset + delta.size]
            self.staging.read(extent, there)
            self.host.put(replace(delta.packed, extent=extent))
        self.drop([digest])
        self.evicted += 1

    def drop(self, digests: Iterable[str]) -> None:
        """Take deltas off the device for good, those that are there."""
        for digest in digests:
            if delta := self.resident.pop(digest, None):
                self._table.index_fill_(0, self._rows[delta.slot], ABSENT)
                self.vocabularies.set(delta.slot, None)
                self.arena.free(digest)
                self._free.append(delta.slot)

    def compact(self) -> None:
        """Close the gaps; what has been admitted then fits."""
        for digest, offset in self.arena.compact().items():
            self.resident[digest].offset = offset
            self._write_table(self.resident[digest])

    def _write_table(self, delta: _Resident) -> None:
        """Say where the tensors of a slot lie, for all sites."""
        entries = rebase(delta.packed.entries, delta.offset)
        self._table[self._rows[delta.slot]] = self.staging.on_device(entries)
