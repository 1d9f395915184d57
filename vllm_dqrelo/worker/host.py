# SPDX-License-Identifier: Apache-2.0
"""Deltas in host memory."""

from collections import OrderedDict
from collections.abc import Collection

from vllm_dqrelo.worker.packed import PackedDelta


class HostTier:
    """Packed deltas by digest, the least recently used first.

    Only ``trim`` makes a delta disappear from memory; its caller says which must stay.

    Args:
        limit: the most bytes that ``trim`` leaves, unless more must stay.

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
        return sum(packed.host_bytes for packed in self.packed.values())

    def get(self, digest: str) -> PackedDelta:
        """A delta, which is from now on the most recently used one."""
        self.packed.move_to_end(digest)
        return self.packed[digest]

    def put(self, packed: PackedDelta) -> None:
        """Add a delta, or mark a delta as used."""
        self.packed.setdefault(packed.digest, packed)
        self.packed.move_to_end(packed.digest)

    def drop(self, digest: str) -> None:
        """Forget a delta, if it is in host memory."""
        self.packed.pop(digest, None)

    def shed(self, resident: Collection[str]) -> None:
        """Drop deltas that the device has as well, until the limit is kept.

        A delta that the device evicts is put here again.
        """
        self._drop_until([digest for digest in self.packed if digest in resident])

    def trim(self, keep: Collection[str], resident: Collection[str]) -> list[str]:
        """Drop deltas until the limit is kept.

        Args:
            keep: digests of deltas that must not disappear.
            resident: digests of deltas that the device has.

        Returns:
            The digests of the deltas that neither the host nor the device has now.
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
        """Drop deltas in this order until the limit is kept, and say which."""
        size, dropped = self.size, []
        for digest in digests:
            if size <= self.limit:
                break
            size -= self.packed.pop(digest).host_bytes
            dropped.append(digest)
        return dropped
