"""Messages as published chat templates read them, made from messages as OpenAI's API has them.

These steps suit every template. Steps that only some templates need are in ``exo.chat.template.reshaping``.
"""

import re
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from exo.chat.template.call_arguments import arguments_object
from exo.chat.template.reshaping import Message, calls_of, text_of

_ASKS_FOR_NONE = re.compile(r"content['\"\])]*\s+is\s+(?:not\s+)?none")
_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n*")
"""What Claude Code puts before its system prompt for Anthropic's accounts. It differs from request to request, so that
no prefix cache could reuse what follows, and says nothing to the model."""
_IDS_ARE_NAMES = "<|tool_calls_section_begin|>"
"""Kimi K2's templates write a call's id where others write its name."""


def template_messages(source: str, messages: Sequence[Mapping[str, JsonValue]]) -> list[Message]:
    """The messages for the template with this source.

    The arguments of calls become objects. The results of calls follow the message that has the calls, in the same
    order, and get the name of the tool that was called. Every call and its result have an id, which is what Kimi's
    models expect. The role "developer", the field "reasoning_content" and missing content are written as the template
    knows them, and fields that say nothing are left out, as is a header that only changes from request to request.
    """
    calls = _Calls(by_name=_IDS_ARE_NAMES in source)
    made: list[Message] = []
    for message in messages:
        one: Message = {**message}
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
    return _results_behind_calls(made)


class _Calls:
    """The calls of a conversation so far, by the id that the client gave them."""

    def __init__(self, *, by_name: bool) -> None:
        self._by_name = by_name
        self._names: dict[str, JsonValue] = {}
        self._ids: dict[str, str] = {}
        self._made = 0
        self._waiting: list[str] = []

    def calls(self, called: Sequence[Mapping[str, JsonValue]]) -> list[JsonValue]:
        """One message's calls as templates read them."""
        self._waiting.clear()
        return [self._call(call) for call in called]

    def result(self, message: Message) -> Message:
        """The result of a call with the name of the tool. Without an id, it is of the first call that waits for one."""
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


def _results_behind_calls(messages: Sequence[Message]) -> list[Message]:
    """Each call's result among the messages up to the assistant's next is moved behind the calls, in their order."""
    made: list[Message] = []
    results: list[Message] = []
    others: list[Message] = []
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
