# SPDX-License-Identifier: Apache-2.0
"""The models that an API server knows: the base, and deltas loaded or loadable."""

import asyncio
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.protocol import BaseModelPath, LoRAModulePath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import (
    ErrorResponse,
    ModelCard,
    ModelList,
    ModelPermission,
)
from vllm.entrypoints.serve.lora.protocol import (
    LoadLoRAAdapterRequest,
    UnloadLoRAAdapterRequest,
)
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.frontend import compat
from vllm_dqrelo.frontend.catalogue import MOST_NAME, Catalogue, DeltaInfo
from vllm_dqrelo.messages.request import delta_request

logger = init_logger(f"vllm.{__name__}")

DRAIN_INTERVAL = 0.05  # seconds
SHOWN = 20  # models that an error names


class DeltaModels(OpenAIServingModels):
    """vLLM's list of models, extended by a catalogue.

    A name that is not loaded is looked up in the catalogue and loaded, once, while its
    requests wait. Where a delta cannot be served, the answer is the reason.

    Args:
        engine_client: an AsyncLLM with ``profiles``.
        base_model_paths: names of the base.
        lora_modules: deltas given at start.
    """

    def __init__(
        self,
        engine_client: EngineClient,
        base_model_paths: list[BaseModelPath],
        *,
        lora_modules: list[LoRAModulePath] | None = None,
    ) -> None:
        super().__init__(engine_client, base_model_paths, lora_modules=lora_modules)
        self.catalogue = Catalogue.from_environment()
        for module in lora_modules or []:
            self.catalogue.give(module.path)
        self.infos: dict[str, DeltaInfo] = {}  # of loaded deltas

    async def find(self, name: str | None) -> LoRARequest | ErrorResponse | None:
        """The loaded delta ``name``, or why it cannot be loaded; None for the base."""
        if not name or self.is_base_model(name):
            return None
        found = self.lora_requests.get(name) or await self.resolve_lora(name)
        if isinstance(found, ErrorResponse) and found.error.code == 404:
            skips = envs.VLLM_SKIP_MODEL_NAME_VALIDATION  # then it means the base
            return None if skips else await self.unknown(name)
        return found

    async def resolve_lora(
        self, lora_name: str, load_inplace: bool = False
    ) -> LoRARequest | ErrorResponse:
        """Load a delta of the catalogue.

        Args:
            lora_name: of the delta.
            load_inplace: read the folder of a loaded delta again.
        """
        loaded = self.infos.get(lora_name) if load_inplace else None
        find, key = (
            (self.catalogue.allowed, str(loaded.folder))
            if loaded
            else (self.catalogue.find, lora_name)
        )
        try:
            folder = await asyncio.to_thread(find, key)
        except (DqreloError, FileNotFoundError) as error:
            return refusal(error)
        async with compat.lock_of(self, lora_name):
            if lora_name in self.lora_requests and not load_inplace:
                return self.lora_requests[lora_name]
            return await self._load(lora_name, folder, load_inplace)

    async def load_lora_adapter(
        self, request: LoadLoRAAdapterRequest, base_model_name: str | None = None
    ) -> ErrorResponse | str:
        """Load a delta from a folder that may be named."""
        name = request.lora_name
        async with compat.lock_of(self, name):
            if error := await compat.problem_of_load(self, request):
                return error
            try:
                folder = await asyncio.to_thread(
                    self.catalogue.allowed, request.lora_path
                )
            except (DqreloError, FileNotFoundError) as problem:
                return refusal(problem)
            loaded = await self._load(name, folder, request.load_inplace)
        if isinstance(loaded, ErrorResponse):
            return loaded
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload_lora_adapter(
        self, request: UnloadLoRAAdapterRequest
    ) -> ErrorResponse | str:
        """Forget a delta and free its memory when its running requests are done."""
        name = request.lora_name
        async with compat.lock_of(self, name):
            if error := await compat.problem_of_unload(self, request):
                return error
            adapter_id = self.lora_requests.pop(name).lora_int_id
            del self.infos[name]
            while self.running(name):
                await asyncio.sleep(DRAIN_INTERVAL)
            await self.engine_client.remove_lora(adapter_id)
        logger.info("dqrelo: delta %s unloaded", name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    async def show_available_models(self) -> ModelList:
        """The base, the loaded deltas, and those of the catalogue."""
        models = await self.registry.show_available_models()
        models.data += [
            ModelCard(
                id=name,
                created=info.created,
                root=str(info.folder),
                parent=self.base_model_paths[0].name,
                max_model_len=self.model_config.max_model_len,
                permission=[ModelPermission()],
                digest=info.digest,
                ratio=info.ratio,
                size=info.size,
            )
            for name, info in (await self.all_infos()).items()
        ]
        return models

    async def all_infos(self) -> dict[str, DeltaInfo]:
        """Name -> description, of each delta that a request can name."""
        listed = await asyncio.to_thread(self.catalogue.list)
        infos = listed | self.infos  # the served content of a folder that changed
        return {n: info for n, info in infos.items() if not self.is_base_model(n)}

    async def unknown(self, name: str) -> ErrorResponse:
        """A 404 that names the models of this server."""
        deltas = {*await asyncio.to_thread(self.catalogue.names), *self.infos}
        names = [model.name for model in self.base_model_paths]
        names += sorted(deltas.difference(names))
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return create_error_response(
            f"The model `{name[:MOST_NAME]}` does not exist. "
            f"Valid models: {', '.join(names[:SHOWN])}{more}.",
            "NotFoundError",
            HTTPStatus.NOT_FOUND,
            "model",
        )

    def running(self, name: str) -> int:
        """The number of unanswered requests for a delta."""
        states = self.engine_client.output_processor.request_states
        return sum(state.lora_name == name for state in states.values())

    async def _load(
        self, name: str, folder: Path, load_inplace: bool = False
    ) -> LoRARequest | ErrorResponse:
        """Load a delta into the engine; the caller holds the lock of the name."""
        try:
            if len(name) > MOST_NAME:
                raise DqreloError(f"a name has at most {MOST_NAME} characters")
            info = await asyncio.to_thread(DeltaInfo.read, folder)
            request = delta_request(name, folder, load_inplace)
            for other in self.lora_requests.values():
                if other.lora_int_id == request.lora_int_id and other.name != name:
                    raise DqreloError(
                        f"{name} and {other.name} have the same number; rename one"
                    )
            await self.engine_client.add_lora(request)
        except Exception as error:
            if self.engine_client.errored:
                raise
            logger.warning("dqrelo: delta %s refused: %s", name, error)
            # vLLM strikes paths out of what it tells clients, names of files included.
            return refusal(error, str(error).replace(str(folder), name))
        self.lora_requests[name], self.infos[name] = request, info
        return request


def refusal(error: Exception, message: str = "") -> ErrorResponse:
    """Why a delta cannot be served, as an answer: 404 if it is missing, else 400.

    Args:
        message: replaces the text of the error.
    """
    if isinstance(error, FileNotFoundError):
        status, kind = HTTPStatus.NOT_FOUND, "NotFoundError"
    else:
        status, kind = HTTPStatus.BAD_REQUEST, "BadRequestError"
    # Names of files are bytes, and not always text.
    text = (message or str(error)).encode(errors="replace").decode()
    return create_error_response(text, kind, status, "model")


async def serving_twin(handler: Any, request: Any) -> Any:
    """The handler of a request: ``handler``, its twin for a delta, or an error."""
    models = handler.models
    if not isinstance(models, DeltaModels):
        return handler
    start, cold = time.monotonic(), request.model not in models.lora_requests
    found = await models.find(request.model)
    if isinstance(found, ErrorResponse):
        return found
    metrics = models.engine_client.delta_metrics
    if found and cold and metrics:
        metrics.waited(time.monotonic() - start)
    profile = models.engine_client.profiles.of(found)
    return profile.twin(handler) if profile else handler


async def check_twin(handler: Any, request: Any) -> ErrorResponse | None:
    """Refuse a delta that a route would serve with files of the base."""
    twin = await serving_twin(handler, request)
    if isinstance(twin, ErrorResponse):
        return twin
    if twin.model_config is not handler.model_config:
        return create_error_response(
            f"{request.model} has a tokenizer, a chat template or a generation config "
            "of its own, which this route does not know; use /v1/chat/completions, "
            "/v1/completions, /v1/responses, /v1/messages, /tokenize or /detokenize"
        )
    return None
