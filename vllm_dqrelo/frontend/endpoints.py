# SPDX-License-Identifier: Apache-2.0
"""``/v1/dqrelo/deltas``: list, load, unload and pin deltas.

A plugin of vLLM's API server, active only when ``VLLM_PLUGINS`` names it. Its routes
require ``--api-key``, as all routes below ``/v1`` do.
"""

from argparse import Namespace
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

from vllm_dqrelo.frontend.models import DeltaModels

router = APIRouter(prefix="/v1/dqrelo/deltas")


class DeltaEndpoints:
    """The plugin, which vLLM loads from the entry point ``vllm.endpoint_plugins``."""

    name = "dqrelo_endpoints"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Nothing to prepare: vLLM's state has the models."""


def delta_models(request: Request) -> DeltaModels:
    """The models of this server; a 400 if vLLM serves without deltas."""
    models = request.app.state.openai_serving_models
    if not isinstance(models, DeltaModels):
        raise HTTPException(
            HTTPStatus.BAD_REQUEST, "this server runs without --quantization dqrelo"
        )
    return models


Models = Depends(delta_models)


@router.get("")
async def list_deltas(models: DeltaModels = Models) -> dict[str, Any]:
    """Every delta that a request can name, and its tier."""
    infos = await models.all_infos()
    return {"object": "list", "data": await entries(models, infos)}


class LoadOptions(BaseModel):
    """The body of a load; ``load_inplace`` as in vLLM's /v1/load_lora_adapter."""

    load_inplace: bool = False


@router.post("/{name:path}/load")
async def load(
    name: str, options: LoadOptions | None = None, models: DeltaModels = Models
) -> dict[str, Any]:
    """Load a delta of the catalogue before its first request, or once more."""
    again = options and options.load_inplace and name in models.lora_requests
    found = models.resolve_lora(name, load_inplace=True) if again else models.find(name)
    found_or_raise(await found, name)
    return await entry(models, name)


@router.post("/{name:path}/unload")
async def unload(name: str, models: DeltaModels = Models) -> dict[str, Any]:
    """Free the memory of a delta; its next request loads the delta again."""
    answer = await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
    found_or_raise(answer, name)
    return {"id": name, "tier": "disk"}


@router.post("/{name:path}/pin")
async def pin(name: str, models: DeltaModels = Models) -> dict[str, Any]:
    """Load a delta and keep it in memory."""
    found = found_or_raise(await models.find(name), name)
    try:
        await models.engine_client.pin_lora(found.lora_int_id)
    except Exception as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error
    return await entry(models, name)


def found_or_raise(answer: Any, name: str) -> Any:
    """``answer``; a 404 for None, and an error for an ErrorResponse."""
    if answer is None:
        raise HTTPException(
            HTTPStatus.NOT_FOUND, f"{name} is not a delta of this server"
        )
    if isinstance(answer, ErrorResponse):
        raise HTTPException(answer.error.code, answer.error.message)
    return answer


async def entry(models: DeltaModels, name: str) -> dict[str, Any]:
    """The entry of one delta, as in ``list_deltas``."""
    (found,) = await entries(models, {name: models.infos[name]})
    return found


async def entries(models: DeltaModels, infos: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each delta: its description, and its tier."""
    # All workers have the same deltas.
    status = (await models.engine_client.collective_rpc("delta_status"))[0]
    in_memory = {one["digest"]: one for one in status}
    found = []
    for name, info in infos.items():
        one = in_memory.get(info.digest, {})
        found.append(
            {
                "id": name,
                **asdict(info),
                "folder": str(info.folder),
                "tier": one.get("tier", "disk"),
                "bytes_in_memory": one.get("size", 0),
                "pinned": one.get("pinned", False),
                "running": models.running(name),
            }
        )
    return found
