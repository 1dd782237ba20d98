"""OpenAI's responses: the reply and the routes."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, final
from uuid import uuid4

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response
from pydantic import BaseModel, JsonValue
from pydantic_core import to_json

from exo.api.http import sse
from exo.api.http.body import read_body
from exo.api.http.errors import ErrorBody
from exo.api.http.openapi_schema import json_body
from exo.api.http.raw_route import DirectRoute
from exo.api.http.reply import ReplyChoice
from exo.api.http.response import GenerationResponse
from exo.api.openai.responses.input import InputItem, InputReference, stored_input, stored_item, told
from exo.api.openai.responses.items import Item, OutputItems
from exo.api.openai.responses.request import ResponsesRequest
from exo.api.openai.responses.store import ResponseStore, StoredResponse
from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.serving.app_state import Services
from exo.serving.events import ChoiceDelta, ChoiceFinished, ChoiceStarted, Completed, GenerationEvent, Started
from exo.serving.generation import Generation
from exo.serving.pictures.prompt_pictures import Given, GivenPicture, marked
from exo.serving.pictures.prompt_pictures import told as told_pictures
from exo.serving.request import Conversation, GenerationRequest
from exo.worker.protocol.commands import SamplingParams
from exo.worker.protocol.events import TokenLogprobs, Usage

_SAMPLING = {"temperature", "top_p", "presence_penalty", "frequency_penalty"}
ResponseId = Annotated[str, Path(description="The id of a response.")]


class ResponseBody(BaseModel):
    """A response; see OpenAI's documentation of the response object."""

    id: str
    object: str
    status: str
    model: str
    output: list[dict[str, Any]]


class Deleted(BaseModel):
    """A response has been deleted."""

    id: str
    object: str = "response"
    deleted: bool = True


class InputItems(BaseModel):
    """The input of a response."""

    object: str = "list"
    data: list[Any]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


@final
class ResponsesDialect:
    """``/v1/responses``. A response is stored when it ends, if the request wants that."""

    media_type = sse.MEDIA_TYPE

    def __init__(
        self,
        response_id: str,
        body: ResponsesRequest,
        items: Sequence[InputItem],
        messages: Sequence[dict[str, JsonValue]],
        store: ResponseStore,
        pictures: Given | None = None,
    ) -> None:
        """``items`` are the request's input, ``messages`` the whole conversation, ``pictures`` those of both."""
        self._id = response_id
        self._body = body
        self._items = items
        self._messages = messages
        self._pictures = pictures or {}
        self._store = store
        self._created = int(time.time())
        self._model = body.model
        self._sampling = SamplingParams(seed=0)
        self._number = -1
        self._cut_off = False
        self._reasoning_tokens = 0
        self._output = OutputItems(response_id, self._tell, body.offered)

    def whole(self, choices: Sequence[ReplyChoice], usage: Usage) -> bytes:
        (choice,) = choices
        if choice.reasoning:
            self._output.add(Reasoning(choice.reasoning))
        if choice.content or not (choice.calls or choice.reasoning):
            self._output.add(Content(choice.content), tuple(choice.logprobs) if self._body.logprobs else ())
        if choice.calls:
            self._output.close(complete=choice.reason != "length" or not all(call.whole for call in choice.calls))
        for index, call in enumerate(choice.calls):
            self._output.add(ToolCall(index, call.name))
            self._output.add(Arguments(index, call.arguments))
            if not call.whole:
                self._output.add(BrokenCall(index, cut_off=True))
        self._cut_off = choice.reason == "length"
        self._reasoning_tokens = choice.reasoning_tokens
        self._output.close(complete=not self._cut_off or bool(choice.calls))
        return to_json(self._finish(usage))

    def write(self, event: GenerationEvent) -> bytes:
        match event:
            case ChoiceDelta():
                logprobs = event.logprobs if self._body.logprobs else ()
                return self._add(event.parts or ((Content(""),) if logprobs else ()), logprobs)
            case ChoiceFinished():
                data = self._add(event.parts, ())
                if not self._output.items:
                    data += self._output.add(Content(""))
                self._cut_off = event.reason == "length"
                self._reasoning_tokens = event.reasoning_tokens
                return data + self._output.close(complete=not self._cut_off)
            case ChoiceStarted():
                begun: dict[str, JsonValue] = {"response": self._wire("in_progress", None)}
                return self._tell("response.created", begun) + self._tell("response.in_progress", begun)
            case Started():
                self._model, self._sampling = event.model_id, event.sampling
                return b""
            case Completed(usage):
                kind = "response.incomplete" if self._cut_off else "response.completed"
                return self._tell(kind, {"response": self._finish(usage)})
            case _:
                return b""

    def _add(self, parts: Sequence[Part], logprobs: tuple[TokenLogprobs, ...]) -> bytes:
        """The log-probabilities belong to the first part."""
        data = b""
        for part in parts:
            data += self._output.add(part, logprobs)
            logprobs = ()
        return data

    def error(self, body: ErrorBody) -> bytes:
        return self._tell("error", {"code": body.code, "message": body.message, "param": body.param})

    def note(self, text: str) -> bytes:
        return sse.comment(text)

    def _tell(self, kind: str, fields: dict[str, JsonValue]) -> bytes:
        self._number += 1
        data = to_json({"type": kind, "sequence_number": self._number, **fields})
        return b"event: " + kind.encode() + b"\n" + sse.event(data)

    def _finish(self, usage: Usage) -> dict[str, JsonValue]:
        response = self._wire("incomplete" if self._cut_off else "completed", usage)
        if self._body.store:
            items: list[JsonValue] = [
                stored_input(item, f"{self._id.removeprefix('resp_')}_{at}") for at, item in enumerate(self._items)
            ]
            messages = (*self._messages, *_said(self._output.items))
            self._store.put(self._id, StoredResponse(response, items, messages, self._pictures))
        return response

    def _wire(self, status: str, usage: Usage | None) -> dict[str, JsonValue]:
        body = self._body
        format_ = body.text.format.model_dump(by_alias=True, exclude_none=True, exclude_unset=True)
        choice = body.tool_choice
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._cut_off else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "model": self._model,
            "output": [item.wire() for item in self._output.items] if usage else [],
            "frequency_penalty": self._sampling.frequency_penalty,
            "parallel_tool_calls": body.parallel_tool_calls,
            "presence_penalty": self._sampling.presence_penalty,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": body.store,
            "temperature": self._sampling.temperature,
            "text": {"format": {"type": "text", **format_}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_none=True),
            "tools": [tool.model_dump() for tool in body.tools],
            "top_logprobs": body.top_logprobs,
            "top_p": self._sampling.top_p,
            "truncation": body.truncation,
            "usage": _usage(usage, self._reasoning_tokens) if usage else None,
            "metadata": dict(body.metadata),
        }


def _usage(usage: Usage, reasoning_tokens: int) -> dict[str, JsonValue]:
    return {
        "input_tokens": usage.prompt_tokens,
        # A local cache costs the client nothing.
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _said(items: Sequence[Item]) -> list[dict[str, JsonValue]]:
    """The output as one message for a chat template, without reasoning, which templates drop as well."""
    content = "".join(item.text for item in items if item.type == "message")
    calls: list[JsonValue] = [
        {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.text}}
        for item in items
        if item.type in ("function_call", "custom_tool_call") and item.status == "completed"
    ]
    message: dict[str, JsonValue] = {"role": "assistant", "content": content}
    return [{**message, "tool_calls": calls} if calls else message]


def responses_request(
    body: ResponsesRequest, messages: Sequence[dict[str, JsonValue]], pictures: Given | None = None
) -> GenerationRequest:
    """The request in no API's form; ``messages`` are the whole conversation, and ``pictures`` those in it."""
    system: list[dict[str, JsonValue]] = (
        [{"role": "system", "content": body.instructions}] if body.instructions is not None else []
    )
    conversation = Conversation(
        messages=(*system, *messages),
        pictures=pictures or {},
        tools=body.callable_tools,
        choice=body.choice,
        parallel=body.parallel_tool_calls,
        effort=body.reasoning.effort,
        effort_param="reasoning.effort",
        reasoning_tokens=body.max_reasoning_tokens,
    )
    return GenerationRequest(
        prompts=(conversation,),
        prompt_field="input",
        sampling=body.model_dump(include=_SAMPLING, exclude_unset=True),
        max_tokens=body.max_output_tokens,
        constraint=body.text.format.constraint,
        logprobs=body.top_logprobs if body.logprobs else None,
        logprobs_param="include",
    )


def responses_routes(services: Services) -> APIRouter:
    """Responses, new and stored."""
    routes = APIRouter(prefix="/v1/responses", tags=["OpenAI"], route_class=DirectRoute)
    store = ResponseStore()

    @routes.post("", response_model=ResponseBody, openapi_extra=json_body(ResponsesRequest))
    async def create_response(request: Request) -> GenerationResponse:
        """Replies to a conversation, which the server may store for the next request."""
        body = await read_body(request, ResponsesRequest)
        earlier = body.previous_response_id
        before = store.get(earlier, "previous_response_id") if earlier else None
        items: list[InputItem] = []
        known: dict[str, GivenPicture] = {}
        if before is not None:
            known = {mark: replace(each, param="previous_response_id") for mark, each in before.pictures.items()}
        for at, item in enumerate(body.input):
            if isinstance(item, InputReference):
                stored, theirs = store.item(item.id, f"input.{at}.id")
                known |= {mark: replace(each, param=f"input.{at}.id") for mark, each in theirs.items()}
                items.append(stored_item(stored))
            else:
                items.append(item)
        messages = (*(before.messages if before is not None else ()), *told(items))
        pictures = marked(list(messages), {**known, **body.pictures})
        response_id = f"resp_{uuid4().hex}"
        model = services.routing.resolve(body.model)
        generation = Generation(services, model, responses_request(body, messages, pictures), response_id)
        dialect = ResponsesDialect(response_id, body, items, messages, store, pictures)
        return GenerationResponse(generation, dialect, stream=body.stream)

    @routes.get("/{response_id}", response_model=ResponseBody)
    async def get_response(response_id: ResponseId) -> Response:
        """A stored response."""
        return Response(to_json(store.get(response_id).body), media_type="application/json")

    @routes.get("/{response_id}/input_items")
    async def input_items(response_id: ResponseId) -> InputItems:
        """The input of a stored response, with sentences in the place of pictures."""
        return InputItems(data=[told_pictures(item) for item in store.get(response_id).input])

    @routes.delete("/{response_id}")
    async def delete_response(response_id: ResponseId) -> Deleted:
        """Deletes a stored response."""
        store.delete(response_id)
        return Deleted(id=response_id)

    return routes
