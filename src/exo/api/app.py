"""The server as an ASGI application."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from exo import __version__
from exo.api.access import AccessControl
from exo.api.anthropic_routes import anthropic_routes
from exo.api.docs import describe
from exo.api.errors import install
from exo.api.llama_routes import llama_routes
from exo.api.ollama_embed import embed_routes
from exo.api.ollama_models import model_routes
from exo.api.ollama_routes import ollama_routes, root_routes
from exo.api.openai_embeddings import embedding_routes
from exo.api.openai_routes import openai_routes
from exo.api.paths import ForgivingPaths
from exo.api.pull_routes import pull_routes
from exo.api.responses_routes import responses_routes
from exo.api.server_routes import server_routes
from exo.api.services import Services
from exo.api.warning import WarningHeader
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
    app.include_router(responses_routes(services))
    app.include_router(embedding_routes(services))
    app.include_router(llama_routes(services))
    app.include_router(anthropic_routes(services))
    app.include_router(ollama_routes(services))
    app.include_router(embed_routes(services))
    app.include_router(model_routes(services))
    app.include_router(root_routes())
    app.include_router(server_routes(services))
    app.include_router(pull_routes(services))
    install(app)
    app.add_middleware(WarningHeader, strict=settings.strict)
    app.add_middleware(ForgivingPaths)
    app.add_middleware(AccessControl, settings=settings)
    describe(app)
    return app
