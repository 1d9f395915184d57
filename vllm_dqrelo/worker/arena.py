# SPDX-License-Identifier: Apache-2.0
"""The bytes that all resident deltas share on the device."""

import torch

from dqrelo_kernels.table import aligned

BOUNCE = 2**26  # bytes through which ``compact`` moves an extent


class Arena:
    """One buffer, handed out in extents: one extent is one delta.

    Args:
        size: bytes.
        device: where they are.

    Attributes:
        data: uint8 [size]. Never reallocated, so that captured graphs stay valid.
    """

    def __init__(self, size: int, device: torch.device | str) -> None:
        self.data = torch.empty(aligned(size), dtype=torch.uint8, device=device)
        # Allocated with the arena, before vLLM measures memory for the KV cache.
        self._bounce = torch.empty_like(self.data[:BOUNCE])
        self._extents: dict[str, tuple[int, int]] = {}  # key -> offset, size

    def allocate(self, key: str, size: int) -> int | None:
        """The offset of a new extent of ``size`` bytes, or None if no gap has it."""
        size, start = aligned(size), 0
        for offset, taken in sorted(self._extents.values()):
            if offset - start >= size:
                break
            start = offset + taken
        if start + size > self.data.numel():
            return None
        self._extents[key] = (start, size)
        return start

    def free(self, key: str) -> None:
        """Give the extent of ``key`` back."""
        del self._extents[key]

    def compact(self) -> dict[str, int]:
        """Move all extents to the front, so that what is free is one gap.

        Returns:
            The new offset of every key. The caller rebases its tables.
        """
        end = 0
        for key, (offset, size) in sorted(self._extents.items(), key=lambda e: e[1]):
            if offset != end:
                self._move(offset, end, size)
                self._extents[key] = (end, size)
            end += size
        return {key: offset for key, (offset, _) in self._extents.items()}

    def _move(self, source: int, target: int, size: int) -> None:
        """Copy ``size`` bytes to a lower offset; the two ranges may overlap."""
        for start in range(0, size, BOUNCE):
            piece = self._bounce[: min(BOUNCE, size - start)]
            piece.copy_(self.data[source + start :][: len(piece)])
            self.data[target + start :][: len(piece)].copy_(piece)
