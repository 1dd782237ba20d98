"""The routes of upstream's API that place instances, tell of them and measure them, over this server's own runners."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal
from uuid import uuid4

import anyio
from fastapi import APIRouter, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, Field, JsonValue
from pydantic_core import to_json

from exo.api.http import sse
from exo.api.http.body import RequestBody, read_body
from exo.api.http.errors import ApiError
from exo.api.http.openapi_schema import json_body
from exo.api.http.raw_route import DirectRoute
from exo.api.http.response import GenerationResponse
from exo.api.http.unary_response import UnaryResponse
from exo.api.openai.response import ChatCompletion
from exo.api.upstream.bench import BenchChatRequest, BenchDialect
from exo.api.upstream.instances import NODE, JsonObject, card_form, instance_form, instance_id, preview_form
from exo.api.upstream.state import ClusterState
from exo.cards.card import ModelCard
from exo.serving.app_state import Services
from exo.serving.errors import ServingError, from_failed
from exo.serving.generation import Generation
from exo.serving.routing import RequestedModel
from exo.worker.protocol.runners import RUNNERS
from exo.worker.supervisor.instance import InstanceReport
from exo.worker.supervisor.runner_error import RunnerError

_DOWNLOAD = "/download/start"
_LOOK_SECONDS = 0.1
_MODEL = "A model id or alias, optionally with @runner."
ModelQuery = Annotated[str, Query(min_length=1, max_length=300, description=_MODEL)]
InstancePath = Annotated[str, PathParameter(max_length=300, description="The id of an instance.")]


class PlaceInstanceRequest(RequestBody):
    """The body of ``POST /place_instance``."""

    model_id: str = Field(min_length=1, max_length=300, description=_MODEL)
    sharding: Literal["Pipeline"] = Field(default="Pipeline", description="An instance has one node.")
    instance_meta: Literal["MlxRing"] = Field(default="MlxRing", description="A ring of one node, whatever its runner.")
    min_nodes: Literal[1] = Field(default=1, description="An instance has one node.")


class CreateInstanceRequest(RequestBody):
    """The body of ``POST /instance``."""

    instance: JsonObject = Field(description="The instance of a preview.")


class StartDownloadRequest(RequestBody):
    """The body of ``POST /download/start``."""

    node: Literal["local"] = Field(default="local", alias="targetNodeId", description="This machine.")
    shard: JsonObject = Field(alias="shardMetadata", description="A shard of the instance of a preview.")


class CommandReceived(BaseModel):
    """The command has been carried out, except that a model may still be loading."""

    message: Literal["Command received."] = "Command received."
    command_id: str
    instance_id: str
    model_card: JsonObject

    @classmethod
    def of(cls, card: ModelCard, runner: str) -> "CommandReceived":
        """The reply to a command that concerns this instance."""
        return cls(command_id=uuid4().hex, instance_id=instance_id(card.model_id, runner), model_card=card_form(card))


def _inner(tagged: JsonValue) -> JsonObject:
    """The content of a tagged object; empty if it is none."""
    inner = next(iter(tagged.values()), None) if isinstance(tagged, dict) else None
    return inner if isinstance(inner, dict) else {}


def upstream_routes(services: Services, models_directory: Path) -> APIRouter:
    """Instances, the state of the cluster, and the benchmark."""
    routes = APIRouter(tags=["upstream exo"], route_class=DirectRoute)
    state = ClusterState(services, models_directory)

    async def start(model: RequestedModel) -> tuple[BaseModel, Mapping[str, str]]:
        chosen = await services.routing.choose(model)
        async with aclosing(services.ensure_files(chosen, model.card)) as steps:
            async for _ in steps:
                pass
        try:
            services.pool.acquire(chosen, model.card)
        except RunnerError as error:
            raise from_failed(error.failed, params={}, retry_seconds=error.retry_seconds) from None
        return CommandReceived.of(model.card, chosen.runner), {}

    def previewed(instance: JsonObject) -> RequestedModel:
        """Raises ``ApiError``."""
        name = _inner(instance).get("instanceId")
        for card in services.cards.known.cards.values():
            for runner in RUNNERS:
                if name == instance_id(card.model_id, runner):
                    return RequestedModel(card, runner)
        message = "instance: its instanceId is of no instance that /instance/previews shows"
        raise ApiError(400, message, code="invalid_value", param="instance")

    def reported(name: str) -> InstanceReport:
        """Raises ``ApiError``."""
        report = state.reports().get(name)
        if report is None:
            raise ApiError(404, f"there is no instance {name!r}", code="not_found")
        return report

    @routes.get("/node_id")
    async def node_id() -> str:
        """The id of this machine."""
        return NODE

    @routes.get("/state")
    async def whole_state() -> JsonValue:
        """Instances, runners, downloads, and the facts about this machine."""
        return await state.at("")

    @routes.get("/state/{path:path}")
    async def part_of_state(
        path: Annotated[str, PathParameter(max_length=1000, description="Keys of the state, separated by slashes.")],
    ) -> JsonValue:
        """A part of the state."""
        return await state.at(path)

    @routes.get("/instance/previews")
    async def previews(model_id: ModelQuery) -> dict[str, list[JsonObject]]:
        """An instance for each runner of the model card, or why this runner cannot serve it."""
        model = services.routing.resolve(model_id)
        served = {backend: name for name, spec in RUNNERS.items() for backend in spec.backends}
        runners = dict.fromkeys(served[backend] for backend in model.card.backends if backend in served)
        found: list[JsonObject] = []
        for runner in runners if model.runner is None else [model.runner]:
            error: str | None = None
            try:
                await services.routing.choose(replace(model, runner=runner))
            except ServingError as refusal:
                error = str(refusal)
            found.append(preview_form(model.card, runner, error))
        return {"previews": found}

    @routes.get("/instance/await", response_class=Response)
    async def await_instance(
        request: Request,
        model_id: ModelQuery,
        timeout_seconds: Annotated[float, Query(ge=0, le=300, description="0 waits for ever.")] = 0,
    ) -> Response:
        """Server-sent events: ``ready`` once there is an instance of the model, or ``timeout``."""
        model_id = services.routing.resolve(model_id).card.model_id

        async def events() -> AsyncGenerator[bytes]:
            began = wrote = anyio.current_time()
            while True:
                for each in state.reports().values():
                    if each.now.model_id == model_id and each.now.state != "Failed":
                        ready: JsonObject = {"type": "ready", "instance": instance_form(each.card, each.now.runner)}
                        yield sse.event(to_json(ready))
                        return
                now = anyio.current_time()
                if request.scope["only_head"] or services.queues.closed or 0 < timeout_seconds <= now - began:
                    yield sse.event(to_json({"type": "timeout", "message": f"there is no instance of {model_id}"}))
                    return
                if now >= wrote + sse.KEEP_ALIVE_SECONDS:
                    wrote = now
                    yield sse.comment("keep-alive")
                await anyio.sleep(_LOOK_SECONDS)

        return StreamingResponse(events(), media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)

    @routes.get("/instance/{name}")
    async def get_instance(name: InstancePath) -> JsonObject:
        """An instance."""
        report = reported(name)
        return instance_form(report.card, report.now.runner)

    @routes.delete("/instance/{name}")
    async def delete_instance(name: InstancePath) -> Response:
        """Unloads an instance when its requests have ended."""

        async def work() -> tuple[BaseModel, Mapping[str, str]]:
            report = reported(name)
            await services.models.unload(report.card.model_id, report.now.runner)
            return CommandReceived.of(report.card, report.now.runner), {}

        return UnaryResponse(work)

    @routes.post("/instance", response_model=CommandReceived, openapi_extra=json_body(CreateInstanceRequest))
    async def create_instance(request: Request) -> Response:
        """Starts the instance of a preview."""
        body = await read_body(request, CreateInstanceRequest)
        return UnaryResponse(lambda: start(previewed(body.instance)))

    @routes.post("/place_instance", response_model=CommandReceived, openapi_extra=json_body(PlaceInstanceRequest))
    async def place_instance(request: Request) -> Response:
        """Starts an instance of a model with the runner that the router chooses."""
        body = await read_body(request, PlaceInstanceRequest)
        return UnaryResponse(lambda: start(services.routing.resolve(body.model_id)))

    @routes.post(_DOWNLOAD, response_model=CommandReceived, openapi_extra=json_body(StartDownloadRequest))
    async def start_download(request: Request) -> Response:
        """Downloads a model that is not on disk. The reply comes when it is."""
        body = await read_body(request, StartDownloadRequest)

        async def work() -> tuple[BaseModel, Mapping[str, str]]:
            card = _inner(body.shard).get("modelCard")
            model = services.routing.resolve(str(card.get("modelId", "")) if isinstance(card, dict) else "")
            chosen = await services.routing.choose(model)
            with services.queues.place(_DOWNLOAD, 1):
                async with aclosing(services.pulls.ensure(model.card, chosen.runner, allowed=True)) as steps:
                    async for _ in steps:
                        pass
            return CommandReceived.of(model.card, chosen.runner), {}

        return UnaryResponse(work)

    @routes.post("/bench/chat/completions", response_model=ChatCompletion, openapi_extra=json_body(BenchChatRequest))
    async def bench_chat_completions(request: Request) -> GenerationResponse:
        """Replies to a conversation and measures it."""
        body = await read_body(request, BenchChatRequest)
        model, reply_id = services.routing.resolve(body.model), f"chatcmpl-{uuid4().hex}"

        def used_memory() -> int:
            mine = (each.measured for each in services.pool.reports() if each.now.model_id == model.card.model_id)
            return sum(each.host + each.device for each in mine if each is not None)

        generation = Generation(services, model, body.request(), reply_id)
        return GenerationResponse(generation, BenchDialect(reply_id, used_memory), stream=body.stream)

    return routes
