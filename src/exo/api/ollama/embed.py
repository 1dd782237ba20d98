"""Ollama's embeddings: replies and routes."""

import time
from collections.abc import Mapping

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from exo.api.http.body import read_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.response import route_headers
from exo.api.http.unary_response import UnaryResponse
from exo.api.ollama.request import LATEST, OllamaEmbeddingsRequest, OllamaEmbedRequest
from exo.api.ollama.response import OllamaReply
from exo.serving.app_state import Services
from exo.serving.embeddings import Embeddings, make_embeddings
from exo.serving.warnings import warn_of_context


class OllamaEmbedResponse(OllamaReply):
    """The reply of ``/api/embed``: a vector of length 1 for each text. ``total_duration`` is in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    prompt_eval_count: int


class OllamaEmbeddingsResponse(OllamaReply):
    """The reply of ``/api/embeddings``."""

    embedding: list[float]


def embed_routes(services: Services) -> APIRouter:
    """The newer and the older endpoint."""
    routes = APIRouter(prefix="/api", tags=["Ollama"])

    async def vectors(
        body: OllamaEmbedRequest | OllamaEmbeddingsRequest, texts: list[str], field: str, dimensions: int | None = None
    ) -> Embeddings:
        made = await make_embeddings(
            services,
            services.routing.resolve(body.model, LATEST),
            texts,
            field=field,
            dimensions=dimensions,
            truncate=body.truncate,
            keep_seconds=body.keep_seconds,
        )
        warn_of_context("options.num_ctx", body.options.num_ctx or 0, made.runner.capabilities.context_length)
        return made

    @routes.post("/embed", response_model=OllamaEmbedResponse, openapi_extra=json_body(OllamaEmbedRequest))
    async def embed(request: Request) -> Response:
        """Makes vectors of texts."""
        arrived = time.monotonic_ns()
        body = await read_body(request, OllamaEmbedRequest)

        async def work() -> tuple[BaseModel, Mapping[str, str]]:
            made = await vectors(body, body.input, "input", body.dimensions)
            reply = OllamaEmbedResponse(
                model=made.runner.card.model_id,
                embeddings=made.vectors,
                total_duration=time.monotonic_ns() - arrived,
                prompt_eval_count=made.tokens,
            )
            return reply, route_headers(made.runner.route)

        return UnaryResponse(work)

    @routes.post(
        "/embeddings", response_model=OllamaEmbeddingsResponse, openapi_extra=json_body(OllamaEmbeddingsRequest)
    )
    async def embeddings(request: Request) -> Response:
        """Makes a vector of one text."""
        body = await read_body(request, OllamaEmbeddingsRequest)

        async def work() -> tuple[BaseModel, Mapping[str, str]]:
            made = await vectors(body, [body.prompt], "prompt")
            return OllamaEmbeddingsResponse(embedding=made.vectors[0]), route_headers(made.runner.route)

        return UnaryResponse(work)

    return routes
