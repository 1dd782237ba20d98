"""OpenAI's embeddings: request, reply and route."""

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, BeforeValidator, Field, JsonValue

from exo.api.http.body import MODEL, RequestBody, honoured, read_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.reply import route_headers
from exo.api.http.unary_response import UnaryResponse
from exo.api.openai.common_request import MAX_INPUTS, Prompt, prompts
from exo.api.openai.response import Reply
from exo.serving.app_state import Services
from exo.serving.errors import RequestError
from exo.serving.unary import ask
from exo.worker.protocol.commands import Embed, Text
from exo.worker.protocol.events import Embedded

Inputs = Annotated[
    list[Prompt],
    BeforeValidator(prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    Field(max_length=MAX_INPUTS),
]


class EmbeddingRequest(RequestBody):
    """The body of ``POST /v1/embeddings``."""

    model: str = MODEL
    input: Inputs = Field(
        description="Each text, or list of token ids, becomes one vector.", json_schema_extra=honoured("embeddings")
    )
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: of the vector as little-endian float32."
    )
    dimensions: int | None = Field(
        default=None, ge=1, description="Keep this many of a vector's first components, normalised to length 1."
    )
    user: JsonValue = Field(default=None, description="Has no effect.")


class Embedding(Reply):
    """One vector, of length 1."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Reply):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Reply):
    """The reply of ``/v1/embeddings``."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def embed_commands(inputs: list[str | list[int]], *, truncate: bool = False) -> list[Embed]:
    """One command for each input. Special tokens in a text are ordinary text."""
    request = uuid4().hex
    return [
        Embed(
            id=f"embd-{request}-{at}",
            prompt=(Text(text=each),) if isinstance(each, str) else tuple(each),
            truncate=truncate,
        )
        for at, each in enumerate(inputs)
    ]


def shortened(vector: Sequence[float], dimensions: int | None) -> list[float]:
    """The first components, made length 1 again. Raises ``ServingError`` if the vector has fewer."""
    if dimensions is None:
        return list(vector)
    if dimensions > len(vector):
        message = f"dimensions: vectors of this model have {len(vector)} components (got {dimensions})"
        raise RequestError(message, code="invalid_value", param="dimensions")
    kept = vector[:dimensions]
    length = math.hypot(*kept) or 1.0
    return [component / length for component in kept]


def _encoded(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def embedding_routes(services: Services) -> APIRouter:
    """Embeddings."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/embeddings", response_model=EmbeddingList, openapi_extra=json_body(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        """Makes vectors of texts."""
        body = await read_body(request, EmbeddingRequest)

        async def work() -> tuple[BaseModel, Mapping[str, str]]:
            model, commands = services.routing.resolve(body.model), embed_commands(body.input)
            answered = await ask(services, model, commands, needs={"embeddings": "model"}, params={"prompt": "input"})
            as_floats = body.encoding_format == "float"
            data: list[Embedding] = []
            tokens = 0
            for index, answer in enumerate(answered.answers):
                assert isinstance(answer, Embedded)
                vector = shortened(answer.vector, body.dimensions)
                data.append(Embedding(index=index, embedding=vector if as_floats else _encoded(vector)))
                tokens += answer.usage.prompt_tokens
            usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
            return EmbeddingList(data=data, model=answered.runner.card.model_id, usage=usage), route_headers(
                answered.runner.route
            )

        return UnaryResponse(work)

    return routes
