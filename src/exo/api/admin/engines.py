"""The engines of a model: which could serve it here, and why another could not."""

from dataclasses import replace

from fastapi import APIRouter, Query
from pydantic import BaseModel

from exo.serving.app_state import Services
from exo.serving.errors import ServingError
from exo.worker.protocol.runners import RUNNERS


class Engine(BaseModel):
    """One runner that serves a backend of the model card."""

    runner: str
    available: bool
    backend: str
    """Empty if it is not available."""
    reason: str
    """The router's reason for or against it."""


class ModelEngines(BaseModel):
    """The engines of a model, in the order of the table of runners."""

    model: str
    engines: list[Engine]


def engine_routes(services: Services) -> APIRouter:
    """The engines of a model."""
    routes = APIRouter(tags=["server"])

    @routes.get("/v1/engines")
    async def engines(
        model: str = Query(min_length=1, max_length=300, description="A model id or alias."),
    ) -> ModelEngines:
        """The engines that could serve a model here, and the reason why another could not."""
        requested = services.routing.resolve(model)
        card = requested.card
        found: list[Engine] = []
        for runner, spec in RUNNERS.items():
            if not set(spec.backends) & set(card.backends):
                continue
            try:
                chosen = await services.routing.choose(replace(requested, runner=runner), arriving=1)
            except ServingError as error:
                found.append(Engine(runner=runner, available=False, backend="", reason=str(error)))
            else:
                found.append(Engine(runner=runner, available=True, backend=chosen.backend, reason=chosen.reason))
        return ModelEngines(model=card.model_id, engines=found)

    return routes
