# SPDX-License-Identifier: Apache-2.0
"""The private names of vLLM's workers; ``vllm_dqrelo/compat.py`` has the form."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_dqrelo.compat import find, replace

logger = init_logger(f"vllm.{__name__}")

PACKINGS = ("vec", "amx")  # of experts on the CPU


# The model runner.


def choose_lora_manager(
    choose: Callable[[VllmConfig], Callable[..., Any] | None],
) -> None:
    """Let ``choose`` name the manager of a worker's adapters, or None for vLLM's own.

    Why: vLLM's manager knows neither signs nor norms nor biases.
    Where: ``LRUCacheWorkerLoRAManager``, v1/worker/lora_model_runner_mixin.py:51; the
        model runner builds it as soon as the model is loaded.
    Upstream: none.
    Until: a plugin may name the manager.
    """
    import vllm.v1.worker.lora_model_runner_mixin as mixin

    def chosen(stock: Callable[..., Any]) -> Callable[..., Any]:
        def manager(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
            return (choose(vllm_config) or stock)(vllm_config, *args, **kwargs)

        return manager

    replace(mixin, "LRUCacheWorkerLoRAManager", chosen)


def after_drafter_load(
    wanted: Callable[[VllmConfig], bool], then: Callable[[Any, torch.nn.Module], None]
) -> None:
    """Call ``then`` with the manager of a worker's adapters and the draft model.

    Why: a drafter takes layers of the target as they are, with deltas, and calls these
        layers with rows of its own.
    Where: ``load_lora_model``, v1/worker/lora_model_runner_mixin.py:42; then V1
        (v1/worker/gpu_model_runner.py:5073, cpu_model_runner.py:76) and V2
        (v1/worker/gpu/model_runner.py:417) have their drafter load its model.
    Upstream: V2 takes the layer below vLLM's own adapters for the embedding
        (v1/worker/gpu/spec_decode/eagle/utils.py:57); none for V1 and for the LM head.
    Until: vLLM asks an adapter's layer for the layer of the base.
    """
    import vllm.v1.worker.lora_model_runner_mixin as mixin

    def noticing(load: Callable[..., torch.nn.Module]) -> Callable[..., Any]:
        @wraps(load)
        def load_lora_model(
            runner: Any, model: torch.nn.Module, vllm_config: VllmConfig, *args: Any
        ) -> torch.nn.Module:
            model = load(runner, model, vllm_config, *args)
            drafter: Any = drafter_of(runner) if wanted(vllm_config) else None
            if hasattr(drafter, "load_model"):
                load_drafter = drafter.load_model

                @wraps(load_drafter)
                def load_model(*args: Any, **kwargs: Any) -> None:
                    load_drafter(*args, **kwargs)
                    if (draft_model := draft_model_of(runner)) is not None:
                        then(runner.lora_manager, draft_model)

                drafter.load_model = load_model
            return model

        return load_lora_model

    replace(mixin.LoRAModelRunnerMixin, "load_lora_model", noticing)


def drafter_of(runner: Any) -> Any:
    """What proposes the drafts of a runner; None where nothing does.

    Where: ``drafter`` of V1, v1/worker/gpu_model_runner.py:591; ``speculator`` of V2,
        v1/worker/gpu/model_runner.py:292.
    """
    if runner.speculative_config is None or not get_pp_group().is_last_rank:
        return None
    return find(runner, "speculator" if hasattr(runner, "lora_state") else "drafter")


def draft_model_of(runner: Any) -> torch.nn.Module | None:
    """The draft model of a runner; None for drafts without a model."""
    drafter = drafter_of(runner)
    if drafter is None or runner.speculative_config.method == "ngram":
        return None
    model: torch.nn.Module = find(drafter, "model")
    return model


def add_worker_call(call: Callable[..., Any]) -> None:
    """Let ``collective_rpc`` call a function of a worker by its name.

    Why: an engine, or an API server, does not import the code of its workers.
    Where: ``WorkerBase``, v1/worker/worker_base.py.
    Upstream: pull request 14185 added ``--worker-extension-cls``, which does the same
        with one class; that option is left to the user.
    Until: there may be several such classes.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, call.__name__, call)


def run_tokens(runner: Any, count: int) -> torch.Tensor:
    """Run ``count`` tokens through a runner's model, as vLLM's profile run does.

    A runner that takes images or prompt embeddings embeds the tokens of a step before
    the runner calls the model, and its profile run leaves the embedding out.

    Where: ``_dummy_run``, v1/worker/gpu_model_runner.py:5508; the embedding is in
        ``_preprocess`` (:3342), on V2 in v1/worker/gpu/mm/encoder_runner.py:294.

    Returns:
        Hidden states [count, K]; what a stage of a pipeline passes on is left out.
    """
    by_embeddings = (
        find(runner, "supports_mm_inputs")
        or runner.vllm_config.model_config.enable_prompt_embeds
    )
    if by_embeddings and get_pp_group().is_first_rank:
        ids = torch.zeros(count, dtype=torch.int32, device=runner.device)
        with torch.inference_mode():
            runner.model.embed_input_ids(ids)
    run = find(runner, "_dummy_run")
    hidden_states: torch.Tensor = run(count, is_profile=True)[0]
    return hidden_states


@contextmanager
def eager(runner: Any) -> Iterator[None]:
    """Have a runner replay no graph.

    Where: on V2 ``is_profile`` of ``execute_model``,
        v1/worker/gpu/model_runner.py:1725;
        on V1 ``CudagraphDispatcher.dispatch``, v1/cudagraph_dispatcher.py:272.
    """
    if hasattr(runner, "lora_state"):
        execute = runner.execute_model
        with patch.object(runner, "execute_model", partial(execute, is_profile=True)):
            yield
    else:
        dispatcher = find(runner, "cudagraph_dispatcher")
        find(dispatcher, "keys_initialized")
        with patch.object(dispatcher, "keys_initialized", False):
            yield


def compile_for_base(runner: Any, is_base: Callable[[], bool]) -> bool:
    """Compile a model once more, and call this code in steps where ``is_base``.

    The model must be as it is to be in these steps.

    Why: vLLM compiles a model once, and drops the guards that would notice that its
        layers were exchanged.
    Where: ``aot_compiled_fn``, compilation/decorators.py:542.
    Upstream: pull request 25914 captures the graphs of a GPU twice, with and without
        adapters; none for compiled code.
    Until: vLLM compiles a model with and without adapters.

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
    no_cache = patch.object(envs, "VLLM_DISABLE_COMPILE_CACHE", True)
    # V2 warms a runner with adapters up with some, though they change nothing.
    no_adapters = patch.object(runner, "lora_config", None)
    with no_cache, no_adapters:
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


# The model.


def map_name(model: torch.nn.Module, name: str) -> tuple[str, Any] | None:
    """vLLM's parameter and shard id for a checkpoint name.

    A module that loads its own weights maps the rest of the name again, as the
    language model inside a multimodal one does.

    Where: ``WeightsMapper._map_name_with_shard``, model_executor/models/utils.py:89.

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


def adds_batch_dimension(model: torch.nn.Module) -> bool:
    """Whether activations are [1, M, ...] and not [M, ...].

    They are in vLLM's own models for transformers code
    (model_executor/models/transformers/base.py:776).
    """
    package = "vllm.model_executor.models.transformers"
    return any(cls.__module__.startswith(package) for cls in type(model).__mro__)


def multiplies_by_weight(method: Any) -> bool:
    """Whether a layer's method is a plain product with ``layer.weight``.

    Where: ``UnquantizedLinearMethod._gemm_impl``, model_executor/layers/linear.py:175.
    """
    from vllm.model_executor.layers.utils import default_unquantized_gemm

    return getattr(method, "_gemm_impl", None) is default_unquantized_gemm


def multiply_by_weight(layer: Any, shape: tuple[int, int]) -> None:
    """Let a linear layer on a CPU multiply by ``layer.weight``, made anew with a shape.

    Why: vLLM packs the weights for its kernels on the CPU and keeps nothing else. What
        the packed weights hold cannot be changed.
    Where: ``dispatch_cpu_unquantized_gemm``, model_executor/layers/utils.py:470, which
        some layers skip so (``_cpu_skip_gemm_dispatch``, linear.py:210).
    Upstream: none.
    Until: a layer on the CPU can be asked to skip the packing.
    """
    find(layer, "cpu_linear")
    weight = torch.empty(shape, dtype=layer.params_dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.cpu_linear = torch.nn.functional.linear
    if layer.bias is not None:  # one of vLLM's kernels takes float32
        layer.bias.data = layer.bias.data.to(layer.params_dtype)


# Mixtures of experts.


def method_of_experts(moe_config: Any) -> Any:
    """vLLM's method of experts in 16 or 32 bits, with weights that we can read, too.

    Why: for an engine with adapters vLLM takes kernels of a GPU that add those. The
        layouts of experts on an Arm or a Power CPU are not known here; there it is the
        method of any CPU.
    Where: model_executor/layers/fused_moe/oracle/unquantized.py:234.
    Upstream: pull request 40273, merged, chose these kernels.
    Until: vLLM's kernels let a delta in between an expert's two matrices.
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
    """How a layer's experts are packed.

    Where: model_executor/layers/fused_moe/experts/cpu_moe.py:88.

    Returns:
        One of PACKINGS, see ``dqrelo_kernels.layout.unpack_experts``; None where they
        are [experts, N, K] as in the checkpoint.
    """
    experts = layer.quant_method.moe_kernel.fused_experts
    packing = getattr(experts, "isa", None)
    return None if getattr(experts, "_use_zentorch", False) else packing


def opaque_experts(runner: Any) -> tuple[str, Any]:
    """The attribute of a layer that calls its experts, and the operator put there.

    Why: torch.compile sees the operator in place of the experts. On a CPU vLLM would
        have it trace them, and ours sort the rows of a step by what the router chose.
    Where: ``MoERunner._forward_entry``,
        model_executor/layers/fused_moe/runner/moe_runner.py:315.
    Upstream: none.
    Until: vLLM takes its own operator on the CPU, too.
    """
    name = "_forward_entry"
    find(runner, name)
    op = "moe_forward" if runner.shared_experts is None else "moe_forward_shared"
    return name, getattr(torch.ops.vllm, op)


def experts_in_turn(shared_experts: Any) -> tuple[str, Callable[[torch.Tensor], Any]]:
    """The attribute that says when shared experts run, and a value: in turn.

    Why: on a GPU vLLM has a stream for them, and layers share the memory that their
        deltas are computed in.
    Where: ``SharedExperts._determine_shared_experts_order``,
        model_executor/layers/fused_moe/runner/shared_experts.py:101.
    Upstream: pull request 26440, merged, added the stream.
    Until: each stream has memory of its own to compute deltas in.
    """
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import (
        SharedExpertsOrder,
    )

    name = "_determine_shared_experts_order"
    find(shared_experts, name)
    return name, lambda hidden_states: SharedExpertsOrder.NO_OVERLAP


def experts_behind(op: Any) -> Callable[..., Any] | None:
    """The function of an operator that hides a layer's experts; None for another.

    A dispatch mode does not see what the operator calls.

    Where: model_executor/layers/fused_moe/runner/moe_runner.py.
    """
    from vllm.model_executor.layers.fused_moe.runner import moe_runner

    if op not in (
        torch.ops.vllm.moe_forward.default,
        torch.ops.vllm.moe_forward_shared.default,
    ):
        return None
    function: Callable[..., Any] = find(moe_runner, f"_{op._opname}")
    return function
