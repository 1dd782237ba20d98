"""OpenAI's endpoints for text: each makes a generation request of its body."""

import time
from uuid import uuid4

from fastapi import APIRouter, Path, Request

from exo.api.http.body import read_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.raw_route import DirectRoute
from exo.api.http.response import GenerationResponse
from exo.api.openai.chat_request import ChatCompletionRequest
from exo.api.openai.common_request import CompletionRequest
from exo.api.openai.completions import Completion, CompletionDialect
from exo.api.openai.response import ChatCompletion, ChatDialect, ListedModel, ModelList
from exo.cards.card import ModelCard
from exo.serving.app_state import Services
from exo.serving.generation import Generation


def openai_routes(services: Services) -> APIRouter:
    """Chat completions, completions and models."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=DirectRoute)
    started = int(time.time())

    def model(card: ModelCard) -> ListedModel:
        return ListedModel(id=card.model_id, created=started, owned_by=card.model_id.partition("/")[0])

    @routes.post("/chat/completions", response_model=ChatCompletion, openapi_extra=json_body(ChatCompletionRequest))
    async def chat_completions(request: Request) -> GenerationResponse:
        """Replies to a conversation."""
        body = await read_body(request, ChatCompletionRequest)
        reply_id = f"chatcmpl-{uuid4().hex}"
        generation = Generation(services, services.routing.resolve(body.model), body.request(), reply_id)
        dialect = ChatDialect(
            reply_id,
            include_usage=body.stream_options.include_usage,
            logprobs=body.logprobs,
            token_ids=body.return_token_ids,
        )
        return GenerationResponse(generation, dialect, stream=body.stream)

    @routes.post("/completions", response_model=Completion, openapi_extra=json_body(CompletionRequest))
    async def completions(request: Request) -> GenerationResponse:
        """Continues prompts, which are text or token ids."""
        body = await read_body(request, CompletionRequest)
        reply_id = f"cmpl-{uuid4().hex}"
        generation = Generation(services, services.routing.resolve(body.model), body.request(), reply_id)
        dialect = CompletionDialect(
            reply_id,
            n=body.n,
            include_usage=body.stream_options.include_usage,
            logprobs=body.logprobs is not None,
            token_ids=body.return_token_ids,
        )
        return GenerationResponse(generation, dialect, stream=body.stream)

    @routes.get("/models")
    async def list_models() -> ModelList:
        """Every model that has a card."""
        return ModelList(data=[model(card) for card in services.cards.known.cards.values()])

    @routes.get("/models/{name:path}")
    async def get_model(name: str = Path(description="A model id or alias.")) -> ListedModel:
        """One model, by id or alias."""
        return model(services.routing.card(name))

    return routes
