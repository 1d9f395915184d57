# SPDX-License-Identifier: Apache-2.0
"""Which rows of a step belong to which delta slot."""

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
        num_active  [2]                     distinct slots, on the CPU: a launcher
                                            reads it without waiting for the device

    Args:
        capacity: the most rows a step can have.
        slots: number of delta slots.
        device: where all but num_active live.
    """

    def __init__(self, capacity: int, slots: int, device: torch.device | str) -> None:
        self.capacity = capacity
        size = 3 * capacity + slots + 1
        pinned = torch.device(device).type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=pinned)
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self.rows = self._device[:capacity]
        self.slots = self._device[capacity : 2 * capacity]
        self.by_row = self._device[2 * capacity : 3 * capacity]
        self.starts = self._device[3 * capacity :]
        self.num_active = torch.zeros(1, dtype=torch.int32)
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
        host = self._host.numpy()
        starts = host[3 * self.capacity :]
        rows = np.argsort(slot_of_row, kind="stable").astype(np.int32)
        grouped = slot_of_row[rows]
        first = np.searchsorted(grouped, 0)  # base rows sort first
        rows, grouped = rows[first:], grouped[first:]
        host[: 3 * self.capacity] = BASE
        host[: len(rows)] = rows
        host[self.capacity : self.capacity + len(rows)] = grouped
        host[2 * self.capacity :][: len(slot_of_row)] = slot_of_row
        starts[:] = np.searchsorted(grouped, np.arange(len(starts)))
        self.num_active[0] = int(np.count_nonzero(np.diff(starts)))
        self._device.copy_(self._host, non_blocking=True)
