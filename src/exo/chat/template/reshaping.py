"""Ways to write a conversation so that a chat template with restrictions accepts it. None of them loses text.

Messages are in the form that ``exo.chat.template.messages`` makes: the arguments of calls are objects, and the results
of calls follow the message with the calls. ``exo.chat.template.fitting`` chooses the reshapings that a template needs.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import takewhile
from typing import cast

from pydantic import JsonValue

ChatMessage = dict[str, JsonValue]
Messages = list[ChatMessage]
Reshaping = Callable[[Messages], Iterable[ChatMessage]]

_SYSTEM = ("system", "developer")
_BETWEEN = "\n\n"


def short_id(whole: str) -> str:
    """Returns a call's id of nine letters and digits. Mistral's templates refuse any other length."""
    return sha256(whole.encode()).hexdigest()[:9]


def text_of(message: Mapping[str, JsonValue]) -> str:
    """Returns the message's text, or "" if its content is missing or in parts."""
    content = message.get("content")
    return content if isinstance(content, str) else ""


def calls_of(message: Mapping[str, JsonValue]) -> list[dict[str, JsonValue]]:
    """Returns the message's calls, which are objects with a ``function``."""
    calls = message.get("tool_calls")
    return cast("list[dict[str, JsonValue]]", calls) if isinstance(calls, list) else []


def short_ids(messages: Messages) -> Iterator[ChatMessage]:
    """Shortens the ids of calls to nine letters and digits."""

    def shortened(holder: Mapping[str, JsonValue], key: str) -> ChatMessage:
        identity = holder.get(key)
        return {**holder, key: short_id(identity)} if isinstance(identity, str) else {**holder}

    for message in messages:
        one = shortened(message, "tool_call_id")
        if calls := calls_of(message):
            one["tool_calls"] = [shortened(call, "id") for call in calls]
        yield one


def developer_to_system(messages: Messages) -> Messages:
    """Renames the role "developer", OpenAI's newer name of "system"."""
    return [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]


def late_system_to_user(messages: Messages) -> Messages:
    """Gives system messages after the beginning to the user, in their place."""
    first = _beginning(messages)
    return messages[:first] + [
        {**message, "role": "user"} if message["role"] in _SYSTEM else message for message in messages[first:]
    ]


def one_system(messages: Messages) -> Messages:
    """Joins the system messages at the beginning."""
    first = _beginning(messages)
    return [*_joined(messages[:first]), *messages[first:]]


def no_system(messages: Messages) -> Messages:
    """Gives the system messages at the beginning to the user, joined."""
    first = _beginning(messages)
    return [*_joined({**message, "role": "user"} for message in messages[:first]), *messages[first:]]


def results_to_user(messages: Messages) -> Iterator[ChatMessage]:
    """Gives results to the user whose calls are not in the conversation."""
    called: set[JsonValue] = set()
    for message in messages:
        called.update(cast("str", call.get("id")) for call in calls_of(message))
        unknown = message["role"] == "tool" and message.get("tool_call_id") not in called
        yield _message("user", text_of(message)) if unknown else message


def calls_to_text(messages: Messages) -> Iterator[ChatMessage]:
    """Writes calls as JSON in the assistant's text, and gives their results to the user."""
    for message in messages:
        if message["role"] == "tool":
            yield _message("user", text_of(message))
        elif calls := calls_of(message):
            texts = [text_of(message), *(_as_json(call) for call in calls)]
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            yield {**kept, "content": "\n".join(filter(None, texts))}
        else:
            yield message


def content_apart(messages: Messages) -> Iterator[ChatMessage]:
    """Moves the assistant's text before a call to a message of its own."""
    for message in messages:
        if calls_of(message) and text_of(message):
            yield _message("assistant", text_of(message))
            yield {**message, "content": ""}
        else:
            yield message


def one_call_each(messages: Messages) -> Iterator[ChatMessage]:
    """Splits messages with several calls, so that each call is followed by its result."""
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = calls_of(message)
        if len(calls) < 2:
            yield message
            continue
        results = list(takewhile(lambda each: each["role"] == "tool", messages[at:]))
        at += len(results)
        for call in calls:
            yield {**message, "tool_calls": [call]}
            yield from (result for result in results if result.get("tool_call_id") == call.get("id"))
            message = {"role": "assistant", "content": message["content"] and ""}  # the text precedes the first call
        ids = [call.get("id") for call in calls]
        yield from (result for result in results if result.get("tool_call_id") not in ids)


def no_empty_reply(messages: Messages) -> Messages:
    """Leaves out the assistant's messages without content and calls. The last one stays, since it may be continued."""
    return [
        message
        for message in messages
        if message["role"] != "assistant" or text_of(message) or calls_of(message) or message is messages[-1]
    ]


def one_turn(messages: Messages) -> Messages:
    """Joins consecutive messages of the user, and of the assistant if they have no calls."""
    made: Messages = []
    for message in messages:
        joins = message["role"] in ("user", "assistant") and not calls_of(message)
        if joins and made and made[-1]["role"] == message["role"] and not calls_of(made[-1]):
            made[-1] = _join(made[-1], message)
        else:
            made.append(message)
    return made


def user_to_result(messages: Messages) -> Messages:
    """Appends the user's message directly after a call's result to the result."""
    made: Messages = []
    for message in messages:
        if made and made[-1]["role"] == "tool" and message["role"] == "user":
            made[-1] = _join(made[-1], {"content": text_of(message)})
        else:
            made.append(message)
    return made


def turns_in_turn(messages: Messages) -> Messages:
    """Makes user and assistant alternate, calls and results aside, beginning with the user. Adds empty messages."""
    first = _beginning(messages)
    made = messages[:first]
    if not messages[first:] or messages[first]["role"] != "user":
        made.append(_message("user", ""))
    # ``turn_end`` is the place after the last turn, where calls and results may have followed since.
    last, turn_end = "user" if made[first:] else "assistant", len(made)
    for message in messages[first:]:
        role = message["role"]
        if role in ("user", "assistant") and not calls_of(message):
            if role == last == "user":
                made.append(_message("assistant", ""))
            elif role == last:
                made.insert(turn_end, _message("user", ""))
            last, turn_end = role, len(made) + 1
        made.append(message)
    return made


def empty_as_text(messages: Messages) -> Messages:
    """Writes missing content as empty text."""
    return [{**message, "content": ""} if message["content"] is None else message for message in messages]


def empty_as_none(messages: Messages) -> Messages:
    """Omits empty content next to calls."""
    return [
        {**message, "content": None} if calls_of(message) and not message["content"] else message
        for message in messages
    ]


def in_parts(messages: Messages) -> Messages:
    """Writes content as a list of one part."""
    return [
        {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content := message.get("content"), str)
        else message
        for message in messages
    ]


RESHAPINGS: Mapping[str, Reshaping] = {
    each.__name__: each
    for each in (
        short_ids,
        developer_to_system,
        late_system_to_user,
        one_system,
        no_system,
        results_to_user,
        calls_to_text,
        content_apart,
        one_call_each,
        no_empty_reply,
        one_turn,
        user_to_result,
        turns_in_turn,
        empty_as_text,
        empty_as_none,
        in_parts,
    )
}
"""The reshapings by name, in the order in which they are applied."""


def reshaped(messages: Sequence[ChatMessage], names: Iterable[str]) -> Messages:
    """Returns the messages after the named reshapings."""
    chosen = set(names)
    made = list(messages)
    for name, reshape in RESHAPINGS.items():
        if name in chosen:
            made = list(reshape(made))
    return made


def _beginning(messages: Sequence[ChatMessage]) -> int:
    """Returns how many messages at the beginning are the system's."""
    return next((at for at, message in enumerate(messages) if message["role"] not in _SYSTEM), len(messages))


def _join(before: ChatMessage, after: Mapping[str, JsonValue]) -> ChatMessage:
    """Joins two messages. The fields of either are kept, and their texts concatenated."""
    made = {**before, **after}
    for key in ("content", "reasoning_content", "thinking"):
        texts = [text for each in (before, after) if isinstance(text := each.get(key), str) and text]
        if texts:
            made[key] = _BETWEEN.join(texts)
    return made


def _joined(messages: Iterable[ChatMessage]) -> Messages:
    made: Messages = []
    for message in messages:
        made = [_join(made[0], {**message, "role": made[0]["role"]})] if made else [message]
    return made


def _message(role: str, content: str) -> ChatMessage:
    return {"role": role, "content": content}


def _as_json(call: Mapping[str, JsonValue]) -> str:
    function = call.get("function")
    assert isinstance(function, dict)
    return json.dumps({"name": function.get("name"), "arguments": function.get("arguments")}, ensure_ascii=False)
