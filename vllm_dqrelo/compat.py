# SPDX-License-Identifier: Apache-2.0
"""Every private name of vLLM that this plugin leans on, and the tested range.

Those of the front end are in frontend/compat.py. Each function looks for the name it
needs and says so when it is not there. Line numbers are of vLLM 0.32.0.
"""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
import vllm
from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

__all__ = ["EngineArgs", "ModelConfig", "VllmConfig"]

logger = init_logger(f"vllm.{__name__}")

# benchmarks/results/versions.csv has what the tests said of each release.
OLDEST, FIRST_UNTESTED = (0, 31), (0, 33)
_PATCHED = "_dqrelo"

PACKINGS = ("vec", "amx")  # of experts on the CPU


def version_problem() -> str | None:
    """Why this vLLM cannot be used, or None."""
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    if OLDEST <= version < FIRST_UNTESTED:
        return None
    tested = f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, FIRST_UNTESTED))}"
    return (
        f"vllm-dqrelo is tested with vLLM {tested}, this is {vllm.__version__}; "
        f'install it with pip install "vllm{tested}"'
    )


def find(owner: Any, name: str) -> Any:
    """``owner.name``, or an error that names both."""
    found = getattr(owner, name, None)
    if found is None:
        raise RuntimeError(
            f"vLLM {vllm.__version__} has no {getattr(owner, '__name__', owner)}."
            f"{name}, which vllm-dqrelo needs: use a version it is tested with"
        )
    return found


def replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """``owner.name = wrap(owner.name)``, once."""
    found = find(owner, name)
    if not hasattr(found, _PATCHED):
        wrapped = wrap(found)
        setattr(wrapped, _PATCHED, True)
        setattr(owner, name, wrapped)


def after_create_model_config(hook: Callable[[EngineArgs, ModelConfig], None]) -> None:
    """Call ``hook`` when an engine has its ModelConfig (engine/arg_utils.py:2650).

    The LoRA configuration is made from ``EngineArgs`` right after that, so that the
    hook can still switch it on.
    """

    def then(create: Callable[..., ModelConfig]) -> Callable[..., ModelConfig]:
        @functools.wraps(create)
        def create_model_config(self: Any, *args: Any, **kwargs: Any) -> ModelConfig:
            model_config = create(self, *args, **kwargs)
            hook(self, model_config)
            return model_config

        return create_model_config

    replace(EngineArgs, "create_model_config", then)


def keep_compilation(wanted: Callable[[VllmConfig], bool]) -> None:
    """Let vLLM compile an engine on the CPU although it has adapters, where ``wanted``.

    Its own operators for adapters cannot be compiled there, so that it turns
    compilation off for all (platforms/cpu.py:379).
    """
    if not current_platform.is_cpu():
        return

    def hiding(check: Callable[[VllmConfig], None]) -> Callable[[VllmConfig], None]:
        @functools.wraps(check)
        def check_and_update_config(vllm_config: VllmConfig) -> None:
            lora_config = vllm_config.lora_config
            if wanted(vllm_config):
                vllm_config.lora_config = None
            try:
                check(vllm_config)
            finally:
                vllm_config.lora_config = lora_config

        return check_and_update_config

    replace(current_platform, "check_and_update_config", hiding)


def skip_base_steps(runner: Any, is_base: Callable[[], bool]) -> None:
    """Do not ask which adapters a step has that has none, if the last one had none.

    It takes some 60 us, for which a step of few milliseconds waits. The runner asks if
    it has a ``lora_config`` (v1/worker/gpu_model_runner.py:2234).

    Args:
        is_base: whether the last step had none.
    """
    update, config = find(runner, "_update_states"), find(runner, "lora_config")

    def _update_states(*args: Any) -> Any:
        deferred = update(*args)
        asks = runner.input_batch.lora_id_to_lora_request or not is_base()
        runner.lora_config = config if asks else None
        return deferred

    runner._update_states = _update_states


def compile_for_base(runner: Any, is_base: Callable[[], bool]) -> bool:
    """Compile a model once more, and call this code in steps where ``is_base``.

    vLLM compiles a model once, with no guard that would notice another step
    (compilation/decorators.py:542). The model must be as it is to be in these steps.

    Args:
        runner: of a model that is compiled.

    Returns:
        Whether that is possible: on the CPU, with vLLM's compilation ahead of time.
    """
    parts = [m for m in runner.model.modules() if getattr(m, "aot_compiled_fn", None)]
    if not parts or not current_platform.is_cpu():
        return False
    logger.info("dqrelo: compiling the model once more, for steps without deltas")
    codes = [part.aot_compiled_fn for part in parts]
    for part in parts:
        part.aot_compiled_fn, part.compiled = None, False
    # The cache has the other code under the same name.
    with patch.object(envs, "VLLM_DISABLE_COMPILE_CACHE", True):
        runner.warming_up_model()
    for part, code in zip(parts, codes, strict=True):
        part.aot_compiled_fn = _either(is_base, find(part, "aot_compiled_fn"), code)
    return True


def _either(
    first: Callable[[], bool], one: Callable[..., Any], other: Callable[..., Any]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return (one if first() else other)(*args, **kwargs)

    return call


def choose_lora_manager(
    choose: Callable[[VllmConfig], Callable[..., Any] | None],
) -> None:
    """Let ``choose`` name the manager of a worker's adapters, or None for vLLM's own.

    The model runner builds it as soon as the model is loaded
    (v1/worker/lora_model_runner_mixin.py:51).
    """
    import vllm.v1.worker.lora_model_runner_mixin as mixin

    def chosen(stock: Callable[..., Any]) -> Callable[..., Any]:
        def manager(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
            return (choose(vllm_config) or stock)(vllm_config, *args, **kwargs)

        return manager

    replace(mixin, "LRUCacheWorkerLoRAManager", chosen)


def around_prompt_logprobs(
    scope: Callable[[Any, torch.Tensor], AbstractContextManager[None]],
) -> None:
    """Compute prompt logprobs within ``scope(lora_manager, hidden_states)``.

    vLLM computes them with slices of ``hidden_states``, the rows of all tokens,
    while its map from rows to adapters still describes the sampled rows
    (v1/worker/gpu_model_runner.py:5306; vLLM issue 51594).
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def within(compute: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compute)
        def scoped(self: Any, hidden_states: torch.Tensor, *args: Any) -> Any:
            with scope(getattr(self, "lora_manager", None), hidden_states):
                return compute(self, hidden_states, *args)

        return scoped

    replace(GPUModelRunner, "_get_prompt_logprobs_dict", within)


def before_scheduler(start: Callable[[Any], None]) -> None:
    """Call ``start(core)`` when an EngineCore has workers and KV cache.

    It makes its scheduler right after that (v1/engine/core.py:158).
    """
    from vllm.v1.engine.core import EngineCore

    def then(initialize: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(initialize)
        def _initialize_kv_caches(self: Any, vllm_config: VllmConfig) -> Any:
            kv_cache_config = initialize(self, vllm_config)
            start(self)
            return kv_cache_config

        return _initialize_kv_caches

    replace(EngineCore, "_initialize_kv_caches", then)


def check_scheduler(scheduler: Any) -> None:
    """See that a scheduler has what ours overrides (v1/core/sched/scheduler.py:591)."""
    from vllm.v1.core.sched.scheduler import Scheduler

    for name in ("_handle_blocked_waiting_request", "_free_request"):
        find(Scheduler, name)
    if not issubclass(scheduler, Scheduler):
        raise ValueError(
            f"--quantization dqrelo cannot be used with --scheduler-cls {scheduler}: "
            "it is no subclass of vLLM's Scheduler"
        )


def replace_lora_calls(core: Any, deltas: Any) -> None:
    """Let ``deltas`` answer an EngineCore's calls about adapters.

    A future that ``add_lora`` returns is answered when it is done, and the engine
    goes on (v1/engine/core.py:1734); an engine in the caller's process has no loop
    that could go on, and waits. A request is bound before its blocks are hashed
    (v1/engine/core.py:1089).
    """
    from vllm.v1.engine.core import EngineCoreProc

    preprocess = find(core, "preprocess_add_request")

    def preprocess_add_request(request: Any) -> Any:
        if request.lora_request:
            request.lora_request = deltas.bind(request.lora_request)
        return preprocess(request)

    def add_lora(lora_request: LoRARequest) -> Any:
        future = deltas.add_lora(lora_request)
        has_loop = isinstance(core, EngineCoreProc)
        return future if has_loop else deltas.wait_for(future)

    core.preprocess_add_request = preprocess_add_request
    for call in (add_lora, deltas.remove_lora, deltas.list_loras, deltas.pin_lora):
        find(core, call.__name__)
        setattr(core, call.__name__, call)


def add_worker_call(call: Callable[..., Any]) -> None:
    """Let ``collective_rpc`` call a function of a worker by its name.

    As ``--worker-extension-cls`` does, which is left to the user.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, call.__name__, call)


def map_name(model: torch.nn.Module, name: str) -> tuple[str, Any] | None:
    """vLLM's parameter and shard id for a checkpoint name (models/utils.py:91).

    A module that loads its own weights maps the rest of the name again, as the
    language model inside a multimodal one does.

    Returns:
        ("model.layers.0.self_attn.qkv_proj.weight", "q"); the shard id is None for
        a parameter that is not fused. None for a name that vLLM drops.
    """
    module: torch.nn.Module | None = model
    path: list[str] = []
    shard = None
    while module is not None:
        if mapper := getattr(module, "hf_to_vllm_mapper", None):
            mapped = find(mapper, "_map_name_with_shard")(name)
            if mapped is None:
                return None
            name, found = mapped
            shard = shard if found is None else found
        head, _, rest = name.partition(".")
        module = module._modules.get(head)
        if module is not None:
            path.append(head)
            name = rest
    return ".".join([*path, name]), shard


def method_of_experts(moe_config: Any) -> Any:
    """vLLM's method of experts in 16 or 32 bits, with weights that we can read, too.

    For an engine with adapters it would take kernels of a GPU that add those
    (fused_moe/oracle/unquantized.py:234). On an Arm or a Power CPU it is the method of
    any CPU, because the layouts of theirs are not known here.
    """
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as moe
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
        CPUUnquantizedExperts,
    )

    backend = moe_config.moe_backend if current_platform.is_cpu() else "triton"
    method = moe.UnquantizedFusedMoEMethod(
        dataclasses.replace(moe_config, is_lora_enabled=False, moe_backend=backend)
    )
    if current_platform.is_cpu() and method.experts_cls.isa not in PACKINGS:
        method.experts_cls = CPUUnquantizedExperts
    return method


def packing_of_experts(layer: Any) -> str | None:
    """How a layer's experts are packed (fused_moe/experts/cpu_moe.py:85).

    Returns:
        One of PACKINGS, see ``dqrelo_kernels.layout.unpack_experts``; None where they
        are [experts, N, K] as in the checkpoint.
    """
    experts = layer.quant_method.moe_kernel.fused_experts
    packing = getattr(experts, "isa", None)
    return None if getattr(experts, "_use_zentorch", False) else packing


def opaque_experts(runner: Any) -> Any:
    """The operator that torch.compile sees in place of a layer's experts on a GPU.

    On a CPU vLLM would have it trace them (fused_moe/runner/moe_runner.py:315), and
    ours sort the rows of a step by what the router chose.
    """
    find(runner, "_forward_entry")
    op = "moe_forward" if runner.shared_experts is None else "moe_forward_shared"
    return getattr(torch.ops.vllm, op)


def experts_in_turn(shared_experts: Any) -> Callable[[torch.Tensor], Any]:
    """What says when shared experts run: in turn with the others, in one stream.

    On a GPU vLLM has a stream for them, beside the router's
    (fused_moe/runner/shared_experts.py:101), and layers share what they compute in.
    """
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import (
        SharedExpertsOrder,
    )

    find(shared_experts, "_determine_shared_experts_order")
    return lambda hidden_states: SharedExpertsOrder.NO_OVERLAP


def experts_behind(op: Any) -> Callable[..., Any] | None:
    """The function of an operator that hides a layer's experts; None for another.

    In a dispatch mode what the operator calls is not seen.
    """
    from vllm.model_executor.layers.fused_moe.runner import moe_runner

    if op not in (
        torch.ops.vllm.moe_forward.default,
        torch.ops.vllm.moe_forward_shared.default,
    ):
        return None
    function: Callable[..., Any] = find(moe_runner, f"_{op._opname}")
    return function


def adds_batch_dimension(model: torch.nn.Module) -> bool:
    """Whether activations are [1, M, ...] and not [M, ...].

    They are in vLLM's own models for transformers code
    (models/transformers/base.py:746).
    """
    package = "vllm.model_executor.models.transformers"
    return any(cls.__module__.startswith(package) for cls in type(model).__mro__)
