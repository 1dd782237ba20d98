"""Ollama's embeddings: replies and routes."""

import time
from collections.abc import Mapping

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from exo.api.http.body import read_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.reply import route_headers
from exo.api.http.unary_response import UnaryResponse
from exo.api.ollama.request import LATEST, OllamaEmbeddingsRequest, OllamaEmbedRequest
from exo.api.ollama.response import OllamaReply
from exo.api.openai.embeddings import embed_commands, shortened
from exo.serving.app_state import Services
from exo.serving.unary import Answered, ask
from exo.serving.warnings import warn_of_context
from exo.worker.protocol.events import Embedded


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
        body: OllamaEmbedRequest | OllamaEmbeddingsRequest, texts: list[str], field: str
    ) -> tuple[Answered, list[Embedded]]:
        answered = await ask(
            services,
            services.routing.resolve(body.model, LATEST),
            embed_commands(list[str | list[int]](texts), truncate=body.truncate),
            needs={"embeddings": "model"},
            params={"prompt": field},
            keep_seconds=body.keep_seconds,
        )
        warn_of_context("options.num_ctx", body.options.num_ctx or 0, answered.runner.capabilities.context_length)
        return answered, [answer for answer in answered.answers if isinstance(answer, Embedded)]

    @routes.post("/embed", response_model=OllamaEmbedResponse, openapi_extra=json_body(OllamaEmbedRequest))
    async def embed(request: Request) -> Response:
        """Makes vectors of texts."""
        arrived = time.monotonic_ns()
        body = await read_body(request, OllamaEmbedRequest)

        async def work() -> tuple[BaseModel, Mapping[str, str]]:
            answered, embedded = await vectors(body, body.input, "input")
            reply = OllamaEmbedResponse(
                model=answered.runner.card.model_id,
                embeddings=[shortened(each.vector, body.dimensions) for each in embedded],
                total_duration=time.monotonic_ns() - arrived,
                prompt_eval_count=sum(each.usage.prompt_tokens for each in embedded),
            )
            return reply, route_headers(answered.runner.route)

        return UnaryResponse(work)

    @routes.post(
        "/embeddings", response_model=OllamaEmbeddingsResponse, openapi_extra=json_body(OllamaEmbeddingsRequest)
    )
    async def embeddings(request: Request) -> Response:
        """Makes a vector of one text."""
        body = await read_body(request, OllamaEmbeddingsRequest)

        async def work() -> tuple[BaseModel, Mapping[str, str]]:
            answered, (embedded,) = await vectors(body, [body.prompt], "prompt")
            return OllamaEmbeddingsResponse(embedding=list(embedded.vector)), route_headers(answered.runner.route)

        return UnaryResponse(work)

    return routes
