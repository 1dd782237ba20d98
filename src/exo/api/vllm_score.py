"""vLLM's ``/v1/score``: how alike two texts are, or how well one answers the other."""

import math
from collections.abc import Mapping
from operator import mul
from typing import Annotated, ClassVar, Literal, Self
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, BeforeValidator, Field, JsonValue, model_validator

from exo.api.http.body import MODEL, RequestBody, Unsupported, invalid, read_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.response import route_headers
from exo.api.http.unary_response import UnaryResponse
from exo.api.openai.common_request import MAX_DOCUMENTS
from exo.api.openai.response import EmbeddingUsage, Reply
from exo.serving.app_state import Services
from exo.serving.embeddings import make_embeddings
from exo.serving.unary import ask
from exo.worker.protocol.commands import Rank
from exo.worker.protocol.events import Ranked


def _several(value: JsonValue) -> JsonValue:
    return [value] if isinstance(value, str) else value


Texts = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_several, json_schema_input_type=str | list[str]),
    Field(min_length=1, max_length=MAX_DOCUMENTS),
]


class ScoreRequest(RequestBody):
    """The body of ``POST /v1/score``: pairs of texts, or one text with each of the others."""

    unsupported: ClassVar[Unsupported] = {"truncate_prompt_tokens": ()}

    model: str = MODEL
    text_1: Texts | None = Field(default=None, description="The queries, or one for all.")
    text_2: Texts | None = Field(default=None, description="The documents, which are compared to the queries.")
    queries: Texts | None = Field(default=None, description="Another name of text_1.")
    documents: Texts | None = Field(default=None, description="Another name of text_2.")
    use_activation: bool = Field(
        default=True, description="Map the scores of a ranking model to 0 to 1 by the logistic function."
    )

    @property
    def left(self) -> list[str]:
        """The queries, as many as there are documents."""
        queries = self.text_1 or self.queries or []
        return queries * len(self.right) if len(queries) == 1 else queries

    @property
    def right(self) -> list[str]:
        """The documents."""
        return self.text_2 or self.documents or []

    @model_validator(mode="after")
    def _pairs_match(self) -> Self:
        if not self.left or not self.right:
            raise invalid("give text_1 and text_2", "text_2" if self.left else "text_1")
        if len(self.left) != len(self.right):
            raise invalid("there must be one text, or as many as in text_2", "text_1")
        return self


class PairScore(Reply):
    """The score of one pair."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(Reply):
    """The reply of ``/v1/score``, in the order of the documents."""

    id: str
    object: Literal["list"] = "list"
    model: str
    data: list[PairScore]
    usage: EmbeddingUsage


async def _scores(services: Services, body: ScoreRequest) -> tuple[BaseModel, Mapping[str, str]]:
    """Scores by the head of a ranking model, or else by the cosine of the vectors."""
    model, name = services.routing.resolve(body.model), uuid4().hex
    pairs = list(zip(body.left, body.right, strict=True))
    if "TextRanking" in model.card.tasks:
        ranks = [Rank(id=f"score-{name}-{at}", query=one, document=other) for at, (one, other) in enumerate(pairs)]
        params = {"query": "text_1", "document": "text_2"}
        answered = await ask(services, model, ranks, needs={"rerank": "model"}, params=params)
        ranked = [each for each in answered.answers if isinstance(each, Ranked)]
        scores = [_logistic(each.score) if body.use_activation else each.score for each in ranked]
        tokens, runner = sum(each.usage.prompt_tokens for each in ranked), answered.runner
    else:
        texts = list(dict.fromkeys([*body.left, *body.right]))
        made = await make_embeddings(services, model, texts, field="text_2")
        vectors = dict(zip(texts, made.vectors, strict=True))
        scores = [sum(map(mul, vectors[one], vectors[other])) for one, other in pairs]
        tokens, runner = made.tokens, made.runner
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    data = [PairScore(index=at, score=score) for at, score in enumerate(scores)]
    reply = ScoreList(id=f"score-{name}", model=runner.card.model_id, data=data, usage=usage)
    return reply, route_headers(runner.route)


def _logistic(score: float) -> float:
    return 1 / (1 + math.exp(-score)) if score >= 0 else 1 - 1 / (1 + math.exp(score))


def score_routes(services: Services) -> APIRouter:
    """Scores of pairs of texts."""
    routes = APIRouter(tags=["vLLM"])

    @routes.post("/v1/score", response_model=ScoreList, openapi_extra=json_body(ScoreRequest))
    @routes.post("/score", include_in_schema=False)
    async def score(request: Request) -> Response:
        """Scores pairs of texts."""
        body = await read_body(request, ScoreRequest)
        return UnaryResponse(lambda: _scores(services, body))

    return routes
