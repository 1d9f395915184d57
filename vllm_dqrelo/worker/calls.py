# SPDX-License-Identifier: Apache-2.0
"""The calls of a worker that other processes make, by name, through ``collective_rpc``.

The engine makes all of them but ``delta_status``, which the API server makes. Their
arguments and results are plain values; ``messages/load.py`` has their classes.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest

from vllm_dqrelo.messages.load import Loaded, Memory, Refused, Usage
from vllm_dqrelo.worker.self_check.check import self_check

if TYPE_CHECKING:
    from vllm_dqrelo.worker.manager import DeltaManager


def manager_of(worker: Any) -> "DeltaManager":
    """The deltas of a worker."""
    manager: DeltaManager = worker.model_runner.lora_manager
    return manager


def start_deltas(worker: Any) -> Memory:
    """Check a worker that has its KV cache, and let the worker serve deltas."""
    manager, runner = manager_of(worker), worker.model_runner
    manager.attach(runner)
    self_check(worker, manager)
    return manager.start(runner)


def start_delta_load(
    worker: Any, request: LoRARequest, others: Mapping[str, int]
) -> None:
    """Begin to read a delta; ``others`` as for ``DeltaManager.read``."""
    manager_of(worker).loader.start(request, others)


def delta_load_done(worker: Any) -> bool:
    """Whether the delta was read."""
    return manager_of(worker).loader.done


def finish_delta_load(
    worker: Any, keep: Collection[str]
) -> tuple[Loaded | Refused, list[str]]:
    """Put the delta that was read into host memory; see ``DeltaManager``."""
    return manager_of(worker).finish_load(keep)


def pin_delta(worker: Any, digest: str) -> None:
    """Note that the engine keeps a delta in memory."""
    manager_of(worker).pinned.add(digest)


def forget_delta(worker: Any, digest: str) -> None:
    """Free the memory of a delta."""
    manager_of(worker).forget(digest)


def delta_usage(worker: Any) -> Usage:
    """The memory that the deltas take now."""
    return manager_of(worker).usage()


def delta_status(worker: Any) -> list[dict[str, Any]]:
    """One entry for each delta in a worker's memory.

    Returns:
        ``digest``, ``size`` in bytes, ``tier`` ("host" or "device") and
        ``pinned``.
    """
    manager = manager_of(worker)
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


CALLS = (
    start_deltas,
    start_delta_load,
    delta_load_done,
    finish_delta_load,
    pin_delta,
    forget_delta,
    delta_usage,
    delta_status,
)
