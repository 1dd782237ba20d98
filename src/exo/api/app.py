"""The server as an ASGI application."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from exo import __version__
from exo.api.access import AccessControl
from exo.api.docs import describe_bodies
from exo.api.errors import install
from exo.api.openai_requests import ChatCompletionRequest, CompletionRequest
from exo.api.openai_routes import openai_routes
from exo.api.server_routes import server_routes
from exo.api.services import Services
from exo.config import Settings


def create_app(settings: Settings, services: Services, *, load: Iterable[str] = ()) -> FastAPI:
    """The application. ``load`` names models to load at the start.

    Starting it takes no time: the host is probed and models are loaded in the background, and requests that depend on
    that wait. Stopping it ends every process it started.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with services.running(load):
            yield

    app = FastAPI(title="exo", version=__version__, lifespan=lifespan, redirect_slashes=False)
    app.include_router(openai_routes(services))
    app.include_router(server_routes(services))
    install(app)
    app.add_middleware(AccessControl, settings=settings)
    describe_bodies(app, ChatCompletionRequest, CompletionRequest)
    return app
