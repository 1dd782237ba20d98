"""The server as an ASGI application."""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

from exo import __version__
from exo.api.docs import describe_bodies
from exo.api.errors import install
from exo.api.openai_requests import ChatCompletionRequest, CompletionRequest
from exo.api.openai_routes import openai_routes
from exo.api.server_routes import server_routes
from exo.api.services import Services
from exo.config import Settings
from exo.models.catalogue import Catalogue


def create_app(
    settings: Settings,
    catalogue: Catalogue,
    *,
    load: Iterable[str] = (),
    commands: Mapping[str, Sequence[str]] | None = None,
) -> FastAPI:
    """The application. ``load`` names models to load at the start; ``commands`` is as for ``Services``.

    Starting it takes no time: the host is probed and models are loaded in the background, and requests that depend on
    that wait. Stopping it ends every process it started.
    """
    services = Services(settings, catalogue, commands)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with services.running(load):
            yield

    app = FastAPI(title="exo", version=__version__, lifespan=lifespan, redirect_slashes=False)
    app.include_router(openai_routes(services))
    app.include_router(server_routes(services))
    install(app)
    describe_bodies(app, ChatCompletionRequest, CompletionRequest)
    return app
