"""Ollama's endpoints for text: each makes a generation request of its body."""

from collections.abc import Mapping
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from exo.api.http.body import read_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.raw_route import DirectRoute
from exo.api.http.response import GenerationResponse, route_headers
from exo.api.http.unary_response import UnaryResponse
from exo.api.ollama.request import LATEST, OllamaChatRequest, OllamaGenerateRequest, OllamaGeneration
from exo.api.ollama.response import OllamaChatResponse, OllamaDialect, OllamaGenerateResponse, loaded
from exo.serving.app_state import Services
from exo.serving.generation import Generation
from exo.serving.request import GenerationRequest
from exo.serving.unary import ask
from exo.serving.warnings import warn_of_context


def ollama_routes(services: Services) -> APIRouter:
    """Chats and completions."""
    routes = APIRouter(prefix="/api", tags=["Ollama"], route_class=DirectRoute)

    def generation(body: OllamaGeneration, request: GenerationRequest, *, chat: bool) -> GenerationResponse:
        reply_id = f"ollama-{uuid4().hex}"
        model = services.routing.resolve(body.model, LATEST)
        dialect = OllamaDialect(reply_id, chat=chat, logprobs=body.logprobs)
        return GenerationResponse(Generation(services, model, request, reply_id), dialect, stream=body.stream)

    def load(body: OllamaGeneration, *, chat: bool) -> UnaryResponse:
        async def work() -> tuple[BaseModel, Mapping[str, str]]:
            if body.keep_alive == 0:
                model_id, _ = await services.models.unload(services.routing.parse(body.model, LATEST).name)
                return loaded(model_id, chat=chat, reason="unload"), {}
            model = services.routing.resolve(body.model, LATEST)
            answered = await ask(services, model, keep_seconds=body.keep_seconds)
            runner = answered.runner
            warn_of_context("options.num_ctx", body.options.num_ctx or 0, runner.capabilities.context_length)
            return loaded(runner.card.model_id, chat=chat), route_headers(runner.route)

        return UnaryResponse(work)

    @routes.post("/chat", response_model=OllamaChatResponse, openapi_extra=json_body(OllamaChatRequest))
    async def chat(request: Request) -> Response:
        """Replies to a conversation."""
        body = await read_body(request, OllamaChatRequest)
        if not body.messages:
            return load(body, chat=True)
        return generation(body, body.generation(body.conversation(), "messages"), chat=True)

    @routes.post("/generate", response_model=OllamaGenerateResponse, openapi_extra=json_body(OllamaGenerateRequest))
    async def generate(request: Request) -> Response:
        """Replies to a prompt. With raw, continues it."""
        body = await read_body(request, OllamaGenerateRequest)
        if not body.prompt and not body.suffix and not body.images:
            return load(body, chat=False)
        return generation(body, body.generation(body.content(), "prompt"), chat=False)

    return routes
