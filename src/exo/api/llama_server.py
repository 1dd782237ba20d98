"""Endpoints of llama-server that OpenAI does not have: tokens, chat templates, ranking and embeddings."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, RootModel, model_validator

from exo.api.http.body import MODEL, RequestBody, Unsupported, honoured, invalid, read_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.response import route_headers
from exo.api.http.unary_response import UnaryResponse, in_pieces
from exo.api.openai.chat_request import ChatCompletionRequest
from exo.api.openai.common_request import MAX_DOCUMENTS, Inputs, TokenId
from exo.api.openai.response import EmbeddingUsage, Reply
from exo.serving.app_state import Services
from exo.serving.embeddings import make_embeddings
from exo.serving.prompt_builder import render, without_pictures
from exo.serving.unary import ask
from exo.worker.protocol.commands import Rank, Text, Tokenize
from exo.worker.protocol.events import Ranked, Tokenized
from exo.worker.protocol.messages import MAX_TOKENIZED

MAX_TEXT = 1 << 22
"""Characters of a text to tokenize. English text of this length has about ``MAX_TOKENIZED`` tokens."""
_PART = 1024
"""Tokens that are decoded at once."""


class TokenizeRequest(RequestBody):
    """The body of ``POST /tokenize``."""

    model: str = MODEL
    content: str = Field(max_length=MAX_TEXT, description="The text to tokenize, up to 2^20 tokens.")
    add_special: bool = Field(default=False, description="Begin with a BOS token if the model uses one.")
    parse_special: bool = Field(
        default=True, description="Whether special tokens in the text have their special meaning."
    )
    with_pieces: bool = Field(default=False, description="Also return each token's text.")


class TokenPiece(Reply):
    """One token. ``piece`` is its text, or its bytes if they are not valid UTF-8."""

    id: int
    piece: str | list[int]


class TokenList(Reply):
    """The reply of ``/tokenize``."""

    tokens: list[int] | list[TokenPiece]


class DetokenizeRequest(RequestBody):
    """The body of ``POST /detokenize``."""

    model: str = MODEL
    tokens: list[TokenId] = Field(max_length=MAX_TOKENIZED, description="Token ids.")


class Detokenized(Reply):
    """The reply of ``/detokenize``. Invalid UTF-8 becomes U+FFFD."""

    content: str


class TemplateApplied(Reply):
    """The reply of ``/apply-template``."""

    prompt: str


class LlamaEmbeddingRequest(RequestBody):
    """The body of ``POST /embedding``; exactly one of ``content`` and ``input``."""

    unsupported: ClassVar[Unsupported] = {"embd_normalize": (2,)}

    model: str = MODEL
    content: Inputs | None = Field(
        default=None, description="Each text becomes one vector.", json_schema_extra=honoured("embeddings")
    )
    input: Inputs | None = Field(
        default=None, description="OpenAI's name of content.", json_schema_extra=honoured("embeddings")
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.content is None) == (self.input is None):
            raise invalid("give one of content and input", "content")
        return self


class LlamaEmbedding(Reply):
    """The vector, of length 1, of one text; a list of one, because llama-server can have one for each token."""

    index: int
    embedding: list[list[float]]


class RerankRequest(RequestBody):
    """The body of ``POST /v1/rerank``."""

    unsupported: ClassVar[Unsupported] = {"return_documents": (False,), "return_text": (False,)}

    model: str = MODEL
    query: str = Field(min_length=1, description="The query to which documents are compared.")
    documents: list[str] = Field(
        min_length=1, max_length=MAX_DOCUMENTS, description="The texts.", json_schema_extra=honoured("rerank")
    )
    top_n: int | None = Field(default=None, ge=1, description="Return only this many results; null returns all.")


class RerankResult(Reply):
    """The score of one document. Only the order of scores is meaningful."""

    index: int
    relevance_score: float


class Reranked(Reply):
    """The reply of ``/v1/rerank``, the best document first."""

    object: Literal["list"] = "list"
    model: str
    usage: EmbeddingUsage
    results: list[RerankResult]


def _piece(raw: tuple[int, ...]) -> str | list[int]:
    try:
        return bytes(raw).decode()
    except UnicodeDecodeError:
        return list(raw)


async def _tokenized(
    services: Services, model: str, command: Tokenize, field: str
) -> tuple[Tokenized, Mapping[str, str]]:
    answered = await ask(services, services.routing.resolve(model), [command], params={"prompt": field})
    (answer,) = answered.answers
    assert isinstance(answer, Tokenized)
    return answer, route_headers(answered.runner.route)


async def _tokens(services: Services, body: TokenizeRequest) -> tuple[BaseModel, Mapping[str, str]]:
    if not body.content and not body.add_special:
        services.routing.resolve(body.model)
        return TokenList(tokens=[]), {}
    text = (Text(text=body.content, special=body.parse_special),)
    command = Tokenize(id=f"tok-{uuid4().hex}", prompt=text, add_bos=body.add_special)
    answer, headers = await _tokenized(services, body.model, command, "content")
    if not body.with_pieces:
        return TokenList.model_construct(tokens=list(answer.tokens)), headers
    pieces: list[TokenPiece] = []
    async for part in in_pieces(list(zip(answer.tokens, answer.bytes, strict=True)), _PART):
        pieces += [TokenPiece(id=token, piece=_piece(raw)) for token, raw in part]
    return TokenList.model_construct(tokens=pieces), headers


async def _text(services: Services, body: DetokenizeRequest) -> tuple[BaseModel, Mapping[str, str]]:
    if not body.tokens:
        services.routing.resolve(body.model)
        return Detokenized(content=""), {}
    command = Tokenize(id=f"detok-{uuid4().hex}", prompt=tuple(body.tokens))
    answer, headers = await _tokenized(services, body.model, command, "tokens")
    parts = [b"".join(map(bytes, part)) async for part in in_pieces(answer.bytes, _PART)]
    return Detokenized(content=b"".join(parts).decode(errors="replace")), headers


async def _prompt(services: Services, body: ChatCompletionRequest) -> tuple[BaseModel, Mapping[str, str]]:
    answered = await ask(services, services.routing.resolve(body.model))
    conversation = without_pictures(answered.runner, body.conversation())
    texts = await render(services, answered.runner, conversation, "messages")
    return TemplateApplied(prompt="".join(text.text for text in texts)), route_headers(answered.runner.route)


async def _embeddings(services: Services, body: LlamaEmbeddingRequest) -> tuple[BaseModel, Mapping[str, str]]:
    field, inputs = ("input", body.input) if body.content is None else ("content", body.content)
    made = await make_embeddings(services, services.routing.resolve(body.model), inputs or [], field=field)
    reply = [LlamaEmbedding(index=at, embedding=[vector]) for at, vector in enumerate(made.vectors)]
    return RootModel(reply), route_headers(made.runner.route)


async def _ranking(services: Services, body: RerankRequest) -> tuple[BaseModel, Mapping[str, str]]:
    ids = uuid4().hex
    commands = [
        Rank(id=f"rank-{ids}-{at}", query=body.query, document=document) for at, document in enumerate(body.documents)
    ]
    model, params = services.routing.resolve(body.model), {"document": "documents"}
    answered = await ask(services, model, commands, needs={"rerank": "model"}, params=params)
    ranked = [answer for answer in answered.answers if isinstance(answer, Ranked)]
    results = [RerankResult(index=at, relevance_score=each.score) for at, each in enumerate(ranked)]
    results.sort(key=lambda each: (-each.relevance_score, each.index))
    tokens = sum(each.usage.prompt_tokens for each in ranked)
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    reply = Reranked(model=answered.runner.card.model_id, usage=usage, results=results[: body.top_n])
    return reply, route_headers(answered.runner.route)


def llama_routes(services: Services) -> APIRouter:
    """Tokenizing, detokenizing, chat templates and ranking."""
    routes = APIRouter(tags=["llama-server"])

    @routes.post("/tokenize", response_model=TokenList, openapi_extra=json_body(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """Splits text into tokens."""
        body = await read_body(request, TokenizeRequest)
        return UnaryResponse(lambda: _tokens(services, body))

    @routes.post("/detokenize", response_model=Detokenized, openapi_extra=json_body(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """Joins tokens to text."""
        body = await read_body(request, DetokenizeRequest)
        return UnaryResponse(lambda: _text(services, body))

    @routes.post("/apply-template", response_model=TemplateApplied, openapi_extra=json_body(ChatCompletionRequest))
    async def apply_template(request: Request) -> Response:
        """Returns the prompt of a chat completion."""
        body = await read_body(request, ChatCompletionRequest)
        return UnaryResponse(lambda: _prompt(services, body))

    @routes.post("/embedding", response_model=list[LlamaEmbedding], openapi_extra=json_body(LlamaEmbeddingRequest))
    async def embedding(request: Request) -> Response:
        """Makes vectors of texts."""
        body = await read_body(request, LlamaEmbeddingRequest)
        return UnaryResponse(lambda: _embeddings(services, body))

    @routes.post("/v1/rerank", response_model=Reranked, openapi_extra=json_body(RerankRequest))
    @routes.post("/rerank", include_in_schema=False)
    @routes.post("/reranking", include_in_schema=False)
    @routes.post("/v1/reranking", include_in_schema=False)
    async def rerank(request: Request) -> Response:
        """Sorts documents by their relevance to a query."""
        body = await read_body(request, RerankRequest)
        return UnaryResponse(lambda: _ranking(services, body))

    return routes
