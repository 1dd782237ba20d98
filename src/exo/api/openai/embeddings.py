"""OpenAI's embeddings: request, reply and route."""

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, JsonValue

from exo.api.http.body import MODEL, RequestBody, honoured, read_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.response import route_headers
from exo.api.http.unary_response import UnaryResponse
from exo.api.openai.common_request import Inputs
from exo.api.openai.response import EmbeddingUsage, Reply
from exo.serving.app_state import Services
from exo.serving.embeddings import make_embeddings


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


class EmbeddingList(Reply):
    """The reply of ``/v1/embeddings``."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


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
            model = services.routing.resolve(body.model)
            made = await make_embeddings(services, model, body.input, dimensions=body.dimensions)
            as_floats = body.encoding_format == "float"
            data = [
                Embedding(index=index, embedding=vector if as_floats else _encoded(vector))
                for index, vector in enumerate(made.vectors)
            ]
            usage = EmbeddingUsage(prompt_tokens=made.tokens, total_tokens=made.tokens)
            reply = EmbeddingList(data=data, model=made.runner.card.model_id, usage=usage)
            return reply, route_headers(made.runner.route)

        return UnaryResponse(work)

    return routes
