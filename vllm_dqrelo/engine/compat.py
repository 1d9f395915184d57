# SPDX-License-Identifier: Apache-2.0
"""The private names of vLLM's EngineCore; ``vllm_dqrelo/compat.py`` has the form."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from vllm.lora.request import LoRARequest

from vllm_dqrelo.compat import find, release, replace, says_why


def is_engine() -> bool:
    """Whether this process may make an EngineCore.

    An engine's process loads its plugins first of all, from ``EngineCore.__init__``.
    """
    return "vllm.v1.engine.core" in sys.modules


def before_scheduler(start: Callable[[Any], None]) -> None:
    """Call ``start(core)`` when an EngineCore has workers and KV cache.

    Why: the engine's deltas need both, and its scheduler, which it makes right after
        that, needs the deltas.
    Where: ``EngineCore._initialize_kv_caches``, v1/engine/core.py:157.
    Upstream: pull request 14466 made the scheduler's class a choice; none for the rest.
    Until: vLLM gives a scheduler the executor of its engine.
    """
    from vllm.v1.engine.core import EngineCore

    def then(initialize: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(initialize)
        def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
            kv_cache_config = initialize(self, vllm_config)
            start(self)
            return kv_cache_config

        return _initialize_kv_caches

    replace(EngineCore, "_initialize_kv_caches", then)


def check_scheduler(scheduler: Any) -> None:
    """Check that a scheduler has the private methods that ``scheduler.py`` overrides.

    Why: a request waits for its delta as another one for its grammar, and ends with it.
    Where: v1/core/sched/scheduler.py:2714 and 3175.
    Upstream: pull request 31941 loads adapters beside the steps; open.
    Until: vLLM's scheduler holds a request back until its adapter is in memory.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    for name in ("_handle_blocked_waiting_request", "_free_request"):
        find(Scheduler, name)
    if not issubclass(scheduler, Scheduler):
        raise ValueError(
            f"--quantization dqrelo cannot be used with --scheduler-cls {scheduler}: "
            "give a subclass of vLLM's Scheduler"
        )


def counts_running() -> bool:
    """Whether vLLM's scheduler counts the adapters of all running requests.

    Why: vLLM 0.32 counts those of the requests in a step. With a pipeline, a running
        request in another stage joins a later step, which could hold more than
        ``--max-loras`` adapters.
    Where: ``scheduled_loras``, v1/core/sched/scheduler.py:889; :1040 in 0.33.0.
    Upstream: done in 0.33.
    Until: vLLM 0.32 leaves the tested range.
    """
    return release() >= (0, 33)


def reason_of_failure(reason: str) -> dict[str, Any]:
    """The fields of an EngineCoreOutput that say why a request failed.

    Why: vLLM 0.32 has no field for a reason. The field for the stop string has it;
        ``LLM`` returns that field, and ``frontend/compat.py`` lets a server answer it.
    Where: ``EngineCoreOutput.error``, v1/engine/__init__.py:247 in 0.33.0.
    Upstream: issue 40978; done in 0.33.
    Until: vLLM 0.32 leaves the tested range.
    """
    fields: dict[str, Any] = {"stop_reason": reason}
    if says_why():
        from vllm.outputs import RequestError

        fields["error"] = RequestError(code="delta_not_loaded", message=reason)
    return fields


def replace_lora_calls(core: Any, deltas: Any) -> None:
    """Let ``deltas`` answer an EngineCore's calls about adapters, and bind requests.

    A future that ``add_lora`` returns is answered when it is done, while the engine
    goes on (v1/engine/core.py:1741). An engine in the caller's process has no loop: it
    waits.

    Why: vLLM reads an adapter within a step, and keys cached prefixes, and images that
        an adapter encodes, by its name and not by its content. A request is bound
        before its blocks are hashed.
    Where: ``EngineCore.preprocess_add_request``, ``add_lora`` and the calls beside it,
        v1/engine/core.py:1051 and 1089.
    Upstream: issues 42125 and 30931, pull request 48352 (keys by content); open.
    Until: vLLM reads adapters beside the steps and keys prefixes by their content.
    """
    from vllm.v1.engine.core import EngineCoreProc

    preprocess = find(core, "preprocess_add_request")
    encodes = core.vllm_config.lora_config.enable_tower_connector_lora

    def preprocess_add_request(request: Any) -> Any:
        if request.lora_request:
            bound = request.lora_request = deltas.bind(request.lora_request)
            for image in (request.mm_features or ()) if encodes else ():
                content = image.mm_hash or image.identifier
                image.identifier = f"{bound.lora_name}:{content}"
        return preprocess(request)

    def add_lora(lora_request: LoRARequest) -> Any:
        future = deltas.add_lora(lora_request)
        has_loop = isinstance(core, EngineCoreProc)
        return future if has_loop else deltas.wait_for(future)

    core.preprocess_add_request = preprocess_add_request
    for call in (add_lora, deltas.remove_lora, deltas.list_loras, deltas.pin_lora):
        find(core, call.__name__)
        setattr(core, call.__name__, call)
