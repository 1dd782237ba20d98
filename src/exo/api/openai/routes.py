"""OpenAI's endpoints for text: each makes a generation request of its body."""

import time
from uuid import uuid4

from fastapi import APIRouter, Path, Request

from exo.api.http.body import read_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.raw_route import DirectRoute
from exo.api.http.response import GenerationResponse
from exo.api.openai.chat_request import ChatCompletionRequest
from exo.api.openai.chat_response import ChatCompletion, ChatDialect
from exo.api.openai.chunks import ListedModel, ModelList
from exo.api.openai.common_request import CompletionRequest, GenerationFields
from exo.api.openai.completions import Completion, CompletionDialect
from exo.cards.card import ModelCard
from exo.serving.app_state import Services
from exo.serving.generation import Generation
from exo.serving.request import Conversation, GenerationRequest, Prompt


def _request(
    body: GenerationFields,
    prompts: tuple[Prompt, ...],
    prompt_field: str,
    max_tokens: int | None,
    logprobs: int | None,
    *,
    echo: bool = False,
) -> GenerationRequest:
    return GenerationRequest(
        prompts=prompts,
        prompt_field=prompt_field,
        n=body.n,
        sampling=body.sampling,
        logit_bias={int(token): bias for token, bias in body.logit_bias.items()},
        seed=body.seed,
        stop=tuple(body.stop),
        max_tokens=max_tokens,
        ignore_eos=body.ignore_eos,
        constraint=next(iter(body.constraints), None),
        logprobs=logprobs,
        echo=echo,
    )


def conversation_of(body: ChatCompletionRequest) -> Conversation:
    """The prompt of a chat completion, in no API's form."""
    effort, effort_param = body.effort
    return Conversation(
        messages=tuple(message.told() for message in body.messages),
        tools=tuple(tool.function.tool() for tool in body.functions) if body.tool_choice != "none" else (),
        choice=body.choice,
        parallel=body.parallel_tool_calls,
        variables=body.chat_template_kwargs,
        effort=effort,
        effort_param=effort_param,
        continues=body.continue_final_message,
    )


def chat_request(body: ChatCompletionRequest) -> GenerationRequest:
    """A chat completion in no API's form."""
    limit = body.max_completion_tokens or body.max_tokens
    return _request(body, (conversation_of(body),), "messages", limit, body.top_logprobs if body.logprobs else None)


def completion_request(body: CompletionRequest) -> GenerationRequest:
    """A completion in no API's form."""
    prompts = tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in body.prompt)
    return _request(body, prompts, "prompt", body.max_tokens, body.logprobs, echo=body.echo)


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
        generation = Generation(services, services.routing.resolve(body.model), chat_request(body), reply_id)
        dialect = ChatDialect(
            reply_id, include_usage=body.include_usage, logprobs=body.logprobs, token_ids=body.return_token_ids
        )
        return GenerationResponse(generation, dialect, stream=body.stream)

    @routes.post("/completions", response_model=Completion, openapi_extra=json_body(CompletionRequest))
    async def completions(request: Request) -> GenerationResponse:
        """Continues prompts, which are text or token ids."""
        body = await read_body(request, CompletionRequest)
        reply_id = f"cmpl-{uuid4().hex}"
        generation = Generation(services, services.routing.resolve(body.model), completion_request(body), reply_id)
        dialect = CompletionDialect(
            reply_id,
            n=body.n,
            include_usage=body.include_usage,
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
