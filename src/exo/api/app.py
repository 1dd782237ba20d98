"""The server as an ASGI application."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

from anyio.to_thread import run_sync
from fastapi import FastAPI

from exo import __version__
from exo.api.admin.activity import activity_routes
from exo.api.admin.engines import engine_routes
from exo.api.admin.metrics import metric_routes
from exo.api.admin.pulls import pull_routes
from exo.api.admin.status import server_routes
from exo.api.anthropic.routes import anthropic_routes
from exo.api.http.errors import install
from exo.api.http.middleware import AccessControl, ForgivingPaths, WarningHeader
from exo.api.http.openapi_schema import describe
from exo.api.http.request_record import RequestRecords
from exo.api.llama_completion import llama_completion_routes
from exo.api.llama_server import llama_routes
from exo.api.llama_status import llama_status_routes
from exo.api.ollama.embed import embed_routes
from exo.api.ollama.models import model_routes
from exo.api.ollama.routes import ollama_routes
from exo.api.openai.embeddings import embedding_routes
from exo.api.openai.models import model_list_routes
from exo.api.openai.responses.routes import responses_routes
from exo.api.openai.routes import openai_routes
from exo.api.page.routes import Page, page_routes
from exo.api.traces import Traces
from exo.api.upstream.routes import upstream_routes
from exo.api.vllm_score import score_routes
from exo.config import Settings
from exo.serving.app_state import Services


def create_app(settings: Settings, services: Services, *, load: Iterable[str] = ()) -> FastAPI:
    """The application. ``load`` names models to load at the start.

    Starting it takes no time: the host is probed and models are loaded in the background, and requests that depend on
    that wait. Stopping it ends every process it started. Raises ``TracesError``.
    """
    traces = None
    if settings.otlp_endpoint is not None:
        traces = Traces(settings.otlp_endpoint, settings.service_name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with services.running(load):
            yield
        if traces is not None:
            await run_sync(traces.close)

    page = Page.read()
    app = FastAPI(  # its own pages about the API take their scripts from another host
        title="exo", version=__version__, lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None
    )
    app.include_router(openai_routes(services))
    app.include_router(model_list_routes(services))
    app.include_router(responses_routes(services))
    app.include_router(embedding_routes(services))
    app.include_router(llama_routes(services))
    app.include_router(llama_completion_routes(services))
    app.include_router(llama_status_routes(services))
    app.include_router(score_routes(services))
    app.include_router(anthropic_routes(services))
    app.include_router(ollama_routes(services))
    app.include_router(embed_routes(services))
    app.include_router(model_routes(services))
    app.include_router(server_routes(services))
    app.include_router(pull_routes(services))
    app.include_router(activity_routes(services))
    app.include_router(metric_routes(services))
    app.include_router(engine_routes(services))
    if settings.upstream_api:
        app.include_router(upstream_routes(services, settings.models_directory))
    app.include_router(page_routes(page))
    install(app)
    app.add_middleware(WarningHeader, strict=settings.strict)
    app.add_middleware(ForgivingPaths)
    # A process monitor has no key, and a browser asks for one when it has the page.
    app.add_middleware(AccessControl, settings=settings, open_paths={"/health", *page.paths})
    on_end = None if traces is None else traces.export
    app.add_middleware(RequestRecords, activity=services.activity, on_end=on_end)
    describe(app)
    return app
