"""Ollama's endpoints: a body in, a generation request out, and the dialect that answers it."""

from collections.abc import Mapping
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel

from exo.api.http.body import read_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.raw_route import DirectRoute
from exo.api.http.response import GenerationReply
from exo.api.http.unary_response import UnaryResponse
from exo.api.ollama.request import OllamaChatRequest, OllamaGenerateRequest, OllamaGeneration
from exo.api.ollama.response import OllamaChatResponse, OllamaDialect, OllamaGenerateResponse, loaded
from exo.serving.app_state import Services
from exo.serving.generation import Generation
from exo.serving.request import GenerationRequest
from exo.serving.unary import Question, ask
from exo.serving.warnings import warn_of_context
from exo.worker.router import parse_model


def served_name(services: Services, model: str) -> str:
    """``model`` without the ":latest" that Ollama's clients add to a name, where no model is called so itself."""
    exact = services.catalogue.get(parse_model(model).name)
    return model if exact is not None and "@" not in model else model.removesuffix(":latest")


def ollama_routes(services: Services) -> APIRouter:
    """Chats and completions."""
    routes = APIRouter(prefix="/api", tags=["Ollama"], route_class=DirectRoute)

    def generation(body: OllamaGeneration, request: GenerationRequest, *, chat: bool) -> GenerationReply:
        reply_id = f"ollama-{uuid4().hex}"
        dialect = OllamaDialect(reply_id, chat=chat, logprobs=body.logprobs)
        return GenerationReply(Generation(services, request, reply_id), dialect, stream=body.stream)

    def load(body: OllamaGeneration, model: str, *, chat: bool) -> UnaryResponse:
        async def work() -> tuple[BaseModel, Mapping[str, str]]:
            if body.keep_alive == 0:
                model_id, _ = await services.unload(model)
                return loaded(model_id, chat=chat, reason="unload"), {}
            question = Question(model=model, needs=None, commands=[], params={}, keep_seconds=body.keep_seconds)
            answered = await ask(services, question)
            runner = answered.runner
            warn_of_context("options.num_ctx", body.options.num_ctx or 0, runner.capabilities.context_length)
            return loaded(runner.card.model_id, chat=chat), answered.headers

        return UnaryResponse(work)

    @routes.post("/chat", response_model=OllamaChatResponse, openapi_extra=json_body(OllamaChatRequest))
    async def chat(request: Request) -> Response:
        """Replies to a conversation."""
        body = await read_body(request, OllamaChatRequest)
        model = served_name(services, body.model)
        if not body.messages:
            return load(body, model, chat=True)
        return generation(body, body.generation(model, body.conversation(), "messages"), chat=True)

    @routes.post("/generate", response_model=OllamaGenerateResponse, openapi_extra=json_body(OllamaGenerateRequest))
    async def generate(request: Request) -> Response:
        """Replies to a prompt, or with raw continues it."""
        body = await read_body(request, OllamaGenerateRequest)
        model = served_name(services, body.model)
        if not body.prompt:
            return load(body, model, chat=False)
        return generation(body, body.generation(model, body.content(), "prompt"), chat=False)

    return routes


def root_routes() -> APIRouter:
    """What tells Ollama's clients that there is a server."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def root() -> PlainTextResponse:
        return PlainTextResponse("exo is running; /docs tells what it offers\n")

    return routes
