"""Anthropic's endpoints: each makes a generation request of its body."""

from collections.abc import Mapping
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import Response

from exo.api.anthropic.request import CountTokensRequest, MessagesRequest
from exo.api.anthropic.response import AnthropicReplyMessage, MessagesDialect, TokenCount
from exo.api.http.body import read_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.raw_route import DirectRoute
from exo.api.http.response import GenerationResponse, route_headers
from exo.api.http.unary_response import UnaryResponse
from exo.serving.app_state import Services
from exo.serving.errors import RequestError
from exo.serving.generation import Generation
from exo.serving.prompt_builder import render, without_pictures
from exo.serving.unary import ask
from exo.worker.protocol.commands import Tokenize
from exo.worker.protocol.events import Tokenized

_PARAMS = {"prompt": "messages"}


async def _count(services: Services, body: CountTokensRequest) -> tuple[TokenCount, Mapping[str, str]]:
    """Raises ``ServingError``."""
    model = services.routing.resolve(body.model)
    loaded = await ask(services, model, params=_PARAMS)
    conversation = body.conversation()
    if loaded.runner.capabilities.vision and conversation.pictures:
        param = next(iter(conversation.pictures.values())).param
        reason = (
            "only the model itself counts a picture's tokens; send the message with max_tokens = 0 and read its usage"
        )
        raise RequestError(f"{param}: {reason}", code="unsupported_parameter", param=param)
    conversation = without_pictures(loaded.runner, conversation)
    prompt = await render(services, loaded.runner, conversation, "messages")
    command = Tokenize(id=f"count-{uuid4().hex}", prompt=prompt)
    answered = await ask(services, model, [command], params=_PARAMS)
    (answer,) = answered.answers
    assert isinstance(answer, Tokenized)
    return TokenCount(input_tokens=len(answer.tokens)), route_headers(answered.runner.route)


def anthropic_routes(services: Services) -> APIRouter:
    """Messages and the count of their tokens. Every ``anthropic-version`` is accepted."""
    routes = APIRouter(prefix="/v1", tags=["Anthropic"], route_class=DirectRoute)

    @routes.post("/messages", response_model=AnthropicReplyMessage, openapi_extra=json_body(MessagesRequest))
    async def messages(request: Request) -> GenerationResponse:
        """Replies to a conversation."""
        body = await read_body(request, MessagesRequest)
        reply_id = f"msg_{uuid4().hex}"
        headers = {"request-id": f"req_{reply_id.removeprefix('msg_')}"}
        generation = Generation(services, services.routing.resolve(body.model), body.request(), reply_id)
        dialect = MessagesDialect(reply_id, max_tokens=body.max_tokens, thinking=body.shows_thinking)
        return GenerationResponse(generation, dialect, stream=body.stream, headers=headers)

    @routes.post("/messages/count_tokens", response_model=TokenCount, openapi_extra=json_body(CountTokensRequest))
    async def count_tokens(request: Request) -> Response:
        """Counts the tokens of a message's prompt."""
        body = await read_body(request, CountTokensRequest)
        return UnaryResponse(lambda: _count(services, body))

    return routes
