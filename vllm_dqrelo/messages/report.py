# SPDX-License-Identifier: Apache-2.0
"""What the deltas of an engine did, on its way from the engine to ``/metrics``."""

from dataclasses import dataclass, field
from typing import Any

RIDER = "dqrelo"  # a key of SchedulerStats.kv_connector_stats


@dataclass
class Report:
    """The present state, and the events since the report before; plain values only.

    It travels in vLLM's SchedulerStats, which go from the engine to the API server
    after each step. Their field for plain values belongs to KV connectors
    (v1/metrics/stats.py:247), which do not see the report.

    Attributes:
        registered: deltas that have a name.
        resident: deltas on the device.
        device_bytes: of the deltas there, of ``device_limit``.
        host_bytes: of the deltas in host memory, of ``host_limit``.
        evicted: deltas that made room for another on the device.
        dropped: deltas that disappeared from memory.
        loads: seconds to read each delta that was read.
        failed_loads: deltas that could not be read or served.
        cold_waits: seconds that each request was held back for its delta.
        steps: (rows of deltas, different deltas) of each step.
        finished: (model, reason, prompt tokens, generated tokens) of each request.
        drafts: (model, drafted tokens, accepted tokens) of each request in each step
            that checked drafts.
    """

    registered: int = 0
    resident: int = 0
    device_bytes: int = 0
    device_limit: int = 0
    host_bytes: int = 0
    host_limit: int = 0
    evicted: int = 0
    dropped: int = 0
    loads: list[float] = field(default_factory=list)
    failed_loads: int = 0
    cold_waits: list[float] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    finished: list[tuple[str, str, int, int]] = field(default_factory=list)
    drafts: list[tuple[str, int, int]] = field(default_factory=list)

    def attach(self, stats: Any) -> None:
        """Put this report into ``stats``, which are changed in place."""
        others = stats.kv_connector_stats or {}
        stats.kv_connector_stats = {**others, RIDER: vars(self)}

    @classmethod
    def detach(cls, stats: Any) -> "Report | None":
        """Take the report out of ``stats``, if one is there."""
        fields = stats and stats.kv_connector_stats
        if not fields or RIDER not in fields:
            return None
        report = cls(**fields.pop(RIDER))
        stats.kv_connector_stats = fields or None
        return report
