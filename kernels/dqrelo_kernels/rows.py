# SPDX-License-Identifier: Apache-2.0
"""Which rows of a step belong to which delta slot."""

from typing import NamedTuple

import numpy as np
import torch

BASE = -1  # the slot of a row that no delta applies to


class RowGroups:
    """The rows of one step grouped by delta slot, in buffers that never move.

    A captured graph keeps reading the same addresses, so the buffers have their
    final size from the start and a step only overwrites them, in one copy. With
    slots [2, -1, 0, 2] for four rows and room for six:

        rows        [2, 0, 3, -1, -1, -1]   row numbers, grouped by slot, stable
        slots       [0, 2, 2, -1, -1, -1]   the slot of each of them
        starts      [0, 1, 1, 3]            group of slot s: rows[starts[s]:starts[s+1]]
        by_row      [2, -1, 0, 2, -1, -1]   the slots as they were given
        unmerged    [0, 1, 2, 3, 4, 5]      all rows but those of merged slots
        num_active  [2]                     distinct slots, on the CPU: a launcher
                                            reads it without waiting for the device
        merged      [[-1, -1, -1]]          on the CPU, too: see below

    ``of_rows`` is (rows, slots, starts, num_active), the last arguments of an op.

    A slot of ``merge_rows`` rows or more is *merged*: for its rows ops.linear makes one
    matrix of the base's and the delta's. Its group comes last; ``starts`` covers only
    the unmerged slots, and ``merged`` has a row (slot, start, end) for each merged one.
    With merge_rows 2:

        rows        [2, 0, 3, -1, -1, -1]   starts     [0, 1, 1, 1]
        merged      [[2, 1, 3], ...]        unmerged   [1, 2, 4, 5, -1, -1]

    Args:
        capacity: the most rows a step can have.
        slots: number of delta slots.
        device: where all but num_active and merged live.
        merge_rows: None: no slot is merged.

    Attributes:
        is_base: whether no row of the step belongs to a slot.
    """

    def __init__(
        self,
        capacity: int,
        slots: int,
        device: torch.device | str,
        merge_rows: int | None = None,
    ) -> None:
        self.capacity = capacity
        self.merge_rows = merge_rows or capacity + 1
        size = 4 * capacity + slots + 1
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self.rows = self._device[:capacity]
        self.slots = self._device[capacity : 2 * capacity]
        self.by_row = self._device[2 * capacity : 3 * capacity]
        self.unmerged = self._device[3 * capacity : 4 * capacity]
        self.starts = self._device[4 * capacity :]
        self.num_active = torch.zeros(1, dtype=torch.int32)
        most = min(slots, max(1, capacity // self.merge_rows))
        self.merged = torch.empty(most, 3, dtype=torch.int32)
        self.of_rows = (self.rows, self.slots, self.starts, self.num_active)
        self.is_base = False
        self.set(np.empty(0, dtype=np.int32))

    def set(self, slot_of_row: np.ndarray) -> None:
        """Describe a step whose row i belongs to slot ``slot_of_row[i]``.

        Args:
            slot_of_row: int [M], M <= capacity; BASE for a base row.
        """
        if len(slot_of_row) > self.capacity:
            raise ValueError(
                f"a step of {len(slot_of_row)} rows, room for {self.capacity}"
            )
        was_base, self.is_base = self.is_base, bool((slot_of_row == BASE).all())
        if was_base and self.is_base:
            return  # all is as it was
        # New memory each time: a device may not have made the copy before this one yet,
        # and torch keeps what is copied until then.
        size, pinned = self._device.shape, self._device.is_cuda
        copied = torch.full(size, BASE, dtype=torch.int32, pin_memory=pinned)
        host, capacity = copied.numpy(), self.capacity
        starts = host[4 * capacity :]
        slots = len(starts) - 1
        count = np.bincount(slot_of_row + 1, minlength=slots + 1)[1:]
        merges = np.append(count >= self.merge_rows, False)  # the last one is BASE's
        order = slot_of_row + slots * merges[slot_of_row]
        rows = np.argsort(order, kind="stable").astype(np.int32)
        order = order[rows]
        first = np.searchsorted(order, 0)  # base rows sort first
        rows, order = rows[first:], order[first:]
        host[: len(rows)] = rows
        host[capacity : capacity + len(rows)] = order % slots
        host[2 * capacity :][: len(slot_of_row)] = slot_of_row
        starts[:] = np.searchsorted(order, np.arange(len(starts)))
        unmerged = np.delete(np.arange(capacity), rows[starts[-1] :])
        host[3 * capacity :][: len(unmerged)] = unmerged
        self.num_active[0] = int(np.count_nonzero(count))
        self.merged.fill_(BASE)
        for i, slot in enumerate(np.flatnonzero(merges)):
            ends = np.searchsorted(order, (slots + slot, slots + slot + 1))
            self.merged[i] = torch.tensor([slot, *ends])
        self._device.copy_(copied, non_blocking=True)


class ExpertGroups(NamedTuple):
    """Rows that chose an expert, grouped by delta slot and expert, on their device.

    What is a slot in ``RowGroups`` is ``slot * experts + expert`` here. With two
    experts and rows of the slots [2, -1, 0, 2] that chose the experts [0, 0, 1, 0]:

        rows        [2, 0, 3, -1]
        slots       [1, 4, 4, -1]
        starts      [0, 0, 1, 1, 1, 3, 3]

    Attributes:
        rows, slots: int32 [M].
        starts: int32 [slots * experts + 1].
    """

    rows: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def of(
        cls,
        slot_of_row: torch.Tensor,
        expert_of_row: torch.Tensor,
        slots: int,
        experts: int,
    ) -> "ExpertGroups":
        """Group the rows without waiting for the device.

        Args:
            slot_of_row: int32 [M]; BASE for a base row.
            expert_of_row: int [M].
            slots, experts: how many there are.
        """
        behind = slots * experts  # where the base's rows go
        keys = slot_of_row * experts + expert_of_row
        keys = torch.where(slot_of_row == BASE, behind, keys)
        keys, rows = keys.sort(stable=True)
        numbers = torch.arange(behind + 1, device=keys.device)
        belongs = keys < behind
        return cls(
            torch.where(belongs, rows, BASE).int(),
            torch.where(belongs, keys, BASE).int(),
            torch.searchsorted(keys, numbers, out_int32=True),
        )
