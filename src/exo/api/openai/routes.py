"""OpenAI's endpoints for text: each makes a generation request of its body."""

from uuid import uuid4

from fastapi import APIRouter, Request

from exo.api.http.body import read_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.raw_route import DirectRoute
from exo.api.http.response import GenerationResponse
from exo.api.openai.chat_request import ChatCompletionRequest
from exo.api.openai.common_request import CompletionRequest
from exo.api.openai.completions import Completion, CompletionDialect
from exo.api.openai.response import ChatCompletion, ChatDialect
from exo.serving.app_state import Services
from exo.serving.generation import Generation


def openai_routes(services: Services) -> APIRouter:
    """Chat completions and completions."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=DirectRoute)

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
            timings=body.timings_per_token,
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
            timings=body.timings_per_token,
        )
        return GenerationResponse(generation, dialect, stream=body.stream)

    return routes
