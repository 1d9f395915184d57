# SPDX-License-Identifier: Apache-2.0
"""Where the deltas of an engine are: on disk, in host memory, on the device."""

from typing import Any


class DeltaStatus:
    """Mixed into vLLM's worker class, which answers the engine's questions."""

    model_runner: Any

    def delta_status(self) -> list[dict[str, Any]]:
        """One entry for each delta in this worker's memory.

        Returns:
            ``id`` of the request object, ``digest``, ``size`` in memory in bytes,
            ``tier`` ("host" or "device") and ``pinned``.
        """
        manager = self.model_runner.lora_manager
        return [
            {
                "id": adapter_id,
                "digest": packed.digest,
                "size": packed.size,
                "tier": "device" if adapter_id in manager.resident else "host",
                "pinned": False,
            }
            for adapter_id, packed in manager.registered.items()
        ]
