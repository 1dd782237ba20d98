"""The routes of upstream's API that place instances, tell of them and measure them, over this server's own runners."""

import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Annotated, Literal
from uuid import uuid4

import anyio
from fastapi import APIRouter, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import Response, StreamingResponse
from pydantic import Field, JsonValue
from pydantic_core import to_json

from exo.api.http import sse
from exo.api.http.body import RequestBody, read_body
from exo.api.http.errors import ApiError
from exo.api.http.openapi_schema import json_body
from exo.api.upstream.state import NODE, SECTIONS, ClusterState, JsonObject, inside, instance_form, instance_id
from exo.cards.card import ModelCard
from exo.serving.app_state import Services
from exo.serving.errors import ServingError, from_failed
from exo.serving.request import RequestedModel
from exo.worker.supervisor.runner_error import RunnerError

_DOWNLOAD = "/download/start"
_MODEL = "A model id or alias, optionally with @runner."
ModelQuery = Annotated[str, Query(min_length=1, max_length=300, description=_MODEL)]
Seconds = Annotated[float, Query(ge=0, le=300, description="0 waits for ever.")]
InstancePath = Annotated[str, PathParameter(max_length=300, description="The id of an instance.")]
StatePath = Annotated[str, PathParameter(max_length=1000, description="Keys of the state, separated by slashes.")]


class PlaceInstanceRequest(RequestBody):
    """The body of ``POST /place_instance``. An instance has one node, whatever its runner."""

    model_id: str = Field(min_length=1, max_length=300, description=_MODEL)
    sharding: Literal["Pipeline"] = Field(default="Pipeline", description="The only kind that one node has.")
    instance_meta: Literal["MlxRing"] = Field(default="MlxRing", description="The only kind that one node has.")
    min_nodes: Literal[1] = Field(default=1, description="This server is one node.")


class CreateInstanceRequest(RequestBody):
    """The body of ``POST /instance``."""

    instance: JsonObject = Field(description="The instance of a preview.")


class StartDownloadRequest(RequestBody):
    """The body of ``POST /download/start``."""

    node: Literal["local"] = Field(default=NODE, alias="targetNodeId", description="This server, the only node.")
    shard: JsonObject = Field(alias="shardMetadata", description="A shard of the instance of a preview.")


def upstream_routes(services: Services, models_directory: Path) -> APIRouter:
    """Instances and the state of the cluster."""
    routes, state = APIRouter(tags=["upstream exo"]), ClusterState(services, models_directory)

    @routes.get("/node_id")
    async def node_id() -> str:
        """The id of this machine."""
        return NODE

    @routes.get("/state")
    async def whole_state() -> JsonObject:
        """Instances, runners, downloads, and the facts about this machine."""
        return {name: await state.section(name) for name in SECTIONS}

    @routes.get("/state/{path:path}")
    async def part_of_state(path: StatePath) -> JsonValue:
        """A part of the state."""
        return await state.at(path)

    _add_commands(routes, services)
    _add_instances(routes, services, state)
    return routes


def _add_commands(routes: APIRouter, services: Services) -> None:
    @routes.get("/instance/previews")
    async def previews(model_id: ModelQuery) -> dict[str, list[JsonObject]]:
        """An instance for each runner of the model card, or why this runner cannot serve it."""
        model = services.routing.resolve(model_id)
        runners = model.card.runners if model.runner is None else (model.runner,)
        return {"previews": [await _preview(services, model, runner) for runner in runners]}

    @routes.post("/instance", openapi_extra=json_body(CreateInstanceRequest))
    async def create_instance(request: Request) -> JsonObject:
        """Starts the instance of a preview. The reply does not wait until the model is loaded."""
        body = await read_body(request, CreateInstanceRequest)
        name = inside(body.instance, "MlxRingInstance", "instanceId")
        for card in services.cards.known.cards.values():
            for runner in card.runners:
                if name == instance_id(card, runner):
                    return await _start(services, RequestedModel(card, runner))
        message = "instance: its instanceId is of no instance that /instance/previews shows"
        raise ApiError(400, message, code="invalid_value", param="instance")

    @routes.post("/place_instance", openapi_extra=json_body(PlaceInstanceRequest))
    async def place_instance(request: Request) -> JsonObject:
        """Starts an instance of a model with the runner that the router chooses."""
        body = await read_body(request, PlaceInstanceRequest)
        return await _start(services, services.routing.resolve(body.model_id))

    @routes.post(_DOWNLOAD, openapi_extra=json_body(StartDownloadRequest))
    async def start_download(request: Request) -> JsonObject:
        """Downloads a model that is not on disk. The reply comes when it is."""
        body = await read_body(request, StartDownloadRequest)
        model_id = inside(body.shard, "PipelineShardMetadata", "modelCard", "modelId")
        if not isinstance(model_id, str):
            message = "shardMetadata: it has no PipelineShardMetadata.modelCard.modelId"
            raise ApiError(400, message, code="invalid_value", param="shardMetadata")
        model = services.routing.resolve(model_id)
        chosen = await services.routing.choose(model)
        with services.queues.place(_DOWNLOAD, 1):
            async with aclosing(services.pulls.ensure(model.card, chosen.runner, allowed=True)) as steps:
                async for _ in steps:
                    pass
        return _received(model.card, chosen.runner)


def _add_instances(routes: APIRouter, services: Services, state: ClusterState) -> None:
    @routes.get("/instance/await", response_class=Response)
    async def await_instance(request: Request, model_id: ModelQuery, timeout_seconds: Seconds = 0) -> Response:
        """Server-sent events: ``ready`` once there is an instance of the model, or ``timeout``."""
        name = services.routing.resolve(model_id).card.model_id
        last = anyio.current_time() + (timeout_seconds or math.inf)

        async def events() -> AsyncGenerator[bytes]:
            for look in count(1):
                for each in state.reports().values():
                    if each.now.model_id == name and each.now.state != "Failed":
                        there = instance_form(each.card, each.now.runner)
                        yield sse.event(to_json({"type": "ready", "instance": there}))
                        return
                if request.scope["only_head"] or services.queues.closed or anyio.current_time() >= last:
                    yield sse.event(to_json({"type": "timeout", "message": f"there is no instance of {name}"}))
                    return
                await anyio.sleep(0.1)
                if look % 100 == 0:
                    yield sse.comment("keep-alive")

        return StreamingResponse(events(), media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)

    @routes.get("/instance/{name}")
    async def get_instance(name: InstancePath) -> JsonObject:
        """An instance."""
        report = state.report(name)
        return instance_form(report.card, report.now.runner)

    @routes.delete("/instance/{name}")
    async def delete_instance(name: InstancePath) -> JsonObject:
        """Unloads an instance when its requests have ended."""
        report = state.report(name)
        await services.models.unload(report.card.model_id, report.now.runner)
        return _received(report.card, report.now.runner)


async def _preview(services: Services, model: RequestedModel, runner: str) -> JsonObject:
    preview: JsonObject = {"model_id": model.card.model_id, "sharding": "Pipeline", "instance_meta": "MlxRing"}
    try:
        await services.routing.choose(replace(model, runner=runner))
    except ServingError as refusal:
        return {**preview, "instance": None, "memory_delta_by_node": None, "error": str(refusal)}
    memory: JsonObject = {NODE: model.card.storage_size.in_bytes}
    return {**preview, "instance": instance_form(model.card, runner), "memory_delta_by_node": memory, "error": None}


async def _start(services: Services, model: RequestedModel) -> JsonObject:
    chosen = await services.routing.choose(model)
    try:
        await services.models.start(chosen, model.card)
    except RunnerError as error:
        raise from_failed(error.failed, params={}, retry_seconds=error.retry_seconds) from None
    return _received(model.card, chosen.runner)


def _received(card: ModelCard, runner: str) -> JsonObject:
    """The reply to a command that concerns this instance."""
    reply: JsonObject = {"message": "Command received.", "command_id": uuid4().hex}
    return {**reply, "instance_id": instance_id(card, runner), "model_card": {"modelId": card.model_id}}
