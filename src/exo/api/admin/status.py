"""Health, readiness, runners, unloading, and the route that a request would take."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from exo.api.admin.runners import Instance, InstanceList
from exo.api.admin.speeds import SpeedAtLoad, known_speeds
from exo.api.http.body import RequestBody, read_body
from exo.api.http.errors import ApiError
from exo.api.http.openapi_schema import json_body
from exo.api.http.response import route_headers
from exo.api.http.unary_response import UnaryResponse
from exo.serving.app_state import Services
from exo.serving.errors import shutting_down
from exo.serving.unary import ask
from exo.worker.router import LiveRunner
from exo.worker.supervisor.placement_plan import PlacementPlan


class Health(BaseModel):
    """The process is up."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """A model can answer."""

    status: Literal["ready"] = "ready"
    models: list[str]
    notices: list[str]
    """Notes for the operator about this host, such as a GPU that is not used."""


class RouteReport(BaseModel):
    """The route of a request for ``model``. ``instance`` is null if a runner would be started."""

    model: str
    runner: str
    host: str = ""
    """The other host where it would run; empty for this machine."""
    instance: str | None
    backend: str
    reason: str
    speeds: list[SpeedAtLoad]
    plan: PlacementPlan | None = None
    """How it is loaded, or would be with no other model loaded; null if its files are not here or nobody asked."""


class UnloadRequest(RequestBody):
    """The body of ``POST /v1/models/unload``."""

    refuses_unknown: ClassVar[bool] = True

    model: str = Field(min_length=1, max_length=300, description="A model id or alias.")


class LoadRequest(RequestBody):
    """The body of ``POST /v1/models/load``."""

    refuses_unknown: ClassVar[bool] = True

    model: str = Field(min_length=1, max_length=300, description="A model id or alias, optionally with @runner.")


class ModelLoaded(BaseModel):
    """The model is loaded."""

    success: Literal[True] = True
    model: str


class RequestCancelled(BaseModel):
    """A request has been cancelled. The names are upstream's."""

    message: Literal["Command cancelled."] = "Command cancelled."
    command_id: str


class Unloaded(BaseModel):
    """``unloaded`` is whether the model was loaded or loading."""

    model: str
    unloaded: bool


def _why_not_ready(live: tuple[LiveRunner, ...], failures: dict[str, str]) -> str:
    loading = [f"{each.model_id} is {each.state}" for each in live]
    failed = [f"{model} could not be loaded: {why}" for model, why in failures.items()]
    return "; ".join(["no model can answer yet", *(loading or ["none is being loaded"]), *failed])


def server_routes(services: Services) -> APIRouter:
    """Health, readiness, the instances and the router's dry run."""
    routes = APIRouter(tags=["server"])

    @routes.get("/health")
    async def health() -> Health:
        """Whether the process is up."""
        return Health()

    @routes.get("/ready")
    async def ready() -> Ready:
        """Whether a model can answer; otherwise 503 with the reason."""
        if services.queues.closed:
            raise shutting_down()
        live = services.pool.live()
        models = sorted({each.model_id for each in live if each.state in ("Ready", "Running")})
        if not models:
            why = "; ".join([_why_not_ready(live, services.models.start_failures), *services.notices])
            raise ApiError(503, why, code="not_ready")
        return Ready(models=models, notices=services.notices)

    @routes.get("/v1/instances")
    async def instances() -> InstanceList:
        """The runners with their load, memory and failures."""
        reports = services.pool.reports()
        data = [Instance.of(each, outdated=services.models.is_outdated(each)) for each in reports]
        return InstanceList(data=data, notices=services.notices)

    @routes.post("/v1/models/unload", response_model=Unloaded, openapi_extra=json_body(UnloadRequest))
    async def unload(request: Request) -> Response:
        """Unloads a model when its requests have ended. The next request for it loads it again."""
        body = await read_body(request, UnloadRequest)

        async def work() -> tuple[BaseModel, Mapping[str, str]]:
            _, unloaded = await services.models.unload(services.routing.parse(body.model).name)
            return Unloaded(model=body.model, unloaded=unloaded), {}

        return UnaryResponse(work)

    @routes.post("/v1/models/load", response_model=ModelLoaded, openapi_extra=json_body(LoadRequest))
    async def load(request: Request) -> Response:
        """Loads a model. The reply comes once it can answer."""
        body = await read_body(request, LoadRequest)

        async def work() -> tuple[BaseModel, Mapping[str, str]]:
            model = services.routing.resolve(body.model)
            answered = await ask(services, model)
            return ModelLoaded(model=model.card.model_id), route_headers(answered.runner.route)

        return UnaryResponse(work)

    @routes.post("/v1/cancel/{name}")
    async def cancel(
        name: str = Path(description="The id of a reply, or the x-request-id of a request."),
    ) -> RequestCancelled:
        """Cancels a request that generates text. Its own client gets an error."""
        if not services.queues.cancel(name):
            raise ApiError(404, f"there is no running request {name[:200]!r}", code="not_found")
        return RequestCancelled(command_id=name)

    @routes.get("/v1/route")
    async def route(
        model: str = Query(min_length=1, max_length=300, description="A model id or alias, optionally with @runner."),
        plan: bool = Query(default=True, description="Whether to plan context and memory, which takes a second."),
    ) -> RouteReport:
        """The runner that would serve the model, and the reason. A refusal is the error that a request would get."""
        requested = services.routing.resolve(model)
        chosen = await services.routing.choose(requested, arriving=1)
        return RouteReport(
            model=requested.card.model_id,
            runner=chosen.runner,
            host=chosen.host,
            instance=chosen.instance,
            backend=chosen.backend,
            reason=chosen.reason,
            speeds=known_speeds(services.speeds, requested.card),
            plan=await services.pool.plan(chosen, requested.card) if plan else None,
        )

    return routes
