"""Converts messages from OpenAI's form to the form that published chat templates read.

These steps suit every template. Steps that only some templates need are in ``exo.chat.template.reshaping``.
"""

import json
import re
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from exo.chat.output.json_scanner import JsonObject
from exo.chat.template.reshaping import ChatMessage, calls_of, text_of

_ASKS_FOR_NONE = re.compile(r"content['\"\])]*\s+is\s+(?:not\s+)?none")
# Claude Code puts this header before its system prompt for Anthropic's accounting. It differs in every request, so that
# no prefix cache could reuse the prompt, and means nothing to the model.
_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n*")
# Kimi K2's templates write a call's id where others write its name.
_IDS_ARE_NAMES = "<|tool_calls_section_begin|>"

_ONLY_ARGUMENT = "arguments"
"""The name of the argument that holds arguments that are not an object."""


def template_messages(source: str, messages: Sequence[Mapping[str, JsonValue]]) -> list[ChatMessage]:
    """Returns the messages for the template with this source.

    The arguments of calls become objects. The results of calls follow the message with the calls, in the same order,
    and get the name of the tool. Every call and its result have an id, as Kimi's models expect. The role "developer",
    the field "reasoning_content" and missing content are written as the template knows them. Empty fields and a header
    that differs in every request are left out.
    """
    calls = _Calls(by_name=_IDS_ARE_NAMES in source)
    made: list[ChatMessage] = []
    for message in messages:
        one: ChatMessage = {**message}
        for key in [key for key, value in message.items() if value is None or (key, value) == ("tool_calls", [])]:
            del one[key]
        one.setdefault("content", "")
        if one["role"] in ("system", "developer") and (header := _BILLING.match(text_of(one))):
            one["content"] = text_of(one)[header.end() :]
            if not one["content"]:
                continue
        if one["role"] == "developer" and "developer" not in source:  # the newer name of "system"
            one["role"] = "system"
        if "reasoning_content" in one and "reasoning_content" not in source and "thinking" in source:
            one["thinking"] = one.pop("reasoning_content")
        if called := calls_of(one):
            one["tool_calls"] = calls.calls(called)
            if not one["content"] and _ASKS_FOR_NONE.search(source):
                one["content"] = None
        if one["role"] == "tool":
            one = calls.result(one)
        made.append(one)
    return _results_after_calls(made)


class _Calls:
    """The calls of a conversation so far, by the client's ids."""

    def __init__(self, *, by_name: bool) -> None:
        self._by_name = by_name
        self._names: dict[str, JsonValue] = {}
        self._ids: dict[str, str] = {}
        self._made = 0
        self._waiting: list[str] = []

    def calls(self, called: Sequence[Mapping[str, JsonValue]]) -> list[JsonValue]:
        """Returns one message's calls as templates read them."""
        self._waiting.clear()
        return [self._call(call) for call in called]

    def result(self, message: ChatMessage) -> ChatMessage:
        """Adds the tool's name to a result. A result without an id belongs to the first call without a result."""
        identity = message.get("tool_call_id")
        if not isinstance(identity, str):
            identity = next(iter(self._waiting), None)
        if identity is None or identity not in self._names:
            return message
        if identity in self._waiting:
            self._waiting.remove(identity)
        return {**message, "name": message.get("name") or self._names[identity], "tool_call_id": self._ids[identity]}

    def _call(self, call: Mapping[str, JsonValue]) -> JsonValue:
        function = call.get("function")
        if not isinstance(function, dict):
            return dict(call)
        given = call.get("id")
        identity = given if isinstance(given, str) and given else f"call_{self._made}"
        name = function.get("name")
        self._names[identity] = name
        self._ids[identity] = f"functions.{name}:{self._made}" if self._by_name else identity
        self._made += 1
        self._waiting.append(identity)
        arguments = arguments_object(function.get("arguments"))
        return {**call, "id": self._ids[identity], "function": {**function, "arguments": arguments}}


def _results_after_calls(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Moves the results of a message's calls, up to the assistant's next message, directly after it in their order."""
    made: list[ChatMessage] = []
    results: list[ChatMessage] = []
    others: list[ChatMessage] = []
    order: list[JsonValue] = []
    for message in [*messages, None]:
        if message is None or message["role"] == "assistant":
            made += sorted(results, key=lambda result: order.index(result["tool_call_id"])) + others
            results, others = [], []
            if message is not None:
                made.append(message)
                order = [call.get("id") for call in calls_of(message)]
        elif message["role"] == "tool" and message.get("tool_call_id") in order:
            results.append(message)
        else:
            others.append(message)
    return made


def arguments_object(arguments: JsonValue) -> dict[str, JsonValue]:
    """Returns the arguments of an earlier call as an object, for any value that the client sends.

    A truncated object is closed where it ends. Any other value becomes the only argument.
    """
    if isinstance(arguments, dict):
        return arguments
    if not isinstance(arguments, str):
        return {} if arguments is None else {_ONLY_ARGUMENT: arguments}
    text = arguments.strip()
    if text in ("", "null"):
        return {}
    found = JsonObject()
    if found.read(text, 0) == len(text) and found.complete(truncated=True):
        return json.loads(found.taken())
    return {_ONLY_ARGUMENT: arguments}
