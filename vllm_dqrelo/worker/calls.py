# SPDX-License-Identifier: Apache-2.0
"""Where the deltas of an engine are: on disk, in host memory, on the device."""

from typing import Any


def delta_status(worker: Any) -> list[dict[str, Any]]:
    """One entry for each delta in a worker's memory; the API server calls it.

    Returns:
        ``digest``, ``size`` in bytes, ``tier`` ("host" or "device") and
        ``pinned``.
    """
    manager = worker.model_runner.lora_manager
    resident = manager.residency.resident
    sizes = {d: packed.size for d, packed in manager.host.packed.items()}
    sizes |= {digest: delta.size for digest, delta in resident.items()}
    return [
        {
            "digest": digest,
            "size": size,
            "tier": "device" if digest in resident else "host",
            "pinned": digest in manager.pinned,
        }
        for digest, size in sizes.items()
    ]
