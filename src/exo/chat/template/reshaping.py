"""Ways to write a conversation so that a chat template with restrictions accepts it. None of them loses text.

Messages come here as ``exo.chat.template.messages`` makes them: the arguments of calls are objects, and the results of
calls follow the message that has the calls.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import cast

from pydantic import JsonValue

Message = dict[str, JsonValue]
Reshaping = Callable[[list[Message]], list[Message]]

_SYSTEM = ("system", "developer")
_BETWEEN = "\n\n"


def short_id(whole: str) -> str:
    """A call's id for a chat template: nine letters and digits, since Mistral's refuse any other length."""
    return sha256(whole.encode()).hexdigest()[:9]


def text_of(message: Mapping[str, JsonValue]) -> str:
    """The message's content, which is text unless ``in_parts`` has made it parts."""
    content = message.get("content")
    return content if isinstance(content, str) else ""


def calls_of(message: Mapping[str, JsonValue]) -> list[dict[str, JsonValue]]:
    """The calls in a message, which are objects with a ``function``."""
    calls = message.get("tool_calls")
    return cast("list[dict[str, JsonValue]]", calls) if isinstance(calls, list) else []


def short_ids(messages: list[Message]) -> list[Message]:
    """Each call's id has nine letters and digits."""

    def shortened(holder: Mapping[str, JsonValue], key: str) -> Message:
        identity = holder.get(key)
        return {**holder, key: short_id(identity)} if isinstance(identity, str) else {**holder}

    made: list[Message] = []
    for message in messages:
        one = shortened(message, "tool_call_id")
        if calls := calls_of(message):
            one["tool_calls"] = [shortened(call, "id") for call in calls]
        made.append(one)
    return made


def developer_to_system(messages: list[Message]) -> list[Message]:
    """The developer, who is the system by a newer name, is the system."""
    return [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]


def late_system_to_user(messages: list[Message]) -> list[Message]:
    """A system message after the beginning is the user's, where it stands."""
    first = _beginning(messages)
    return messages[:first] + [
        {**message, "role": "user"} if message["role"] in _SYSTEM else message for message in messages[first:]
    ]


def one_system(messages: list[Message]) -> list[Message]:
    """The system messages at the beginning are one."""
    first = _beginning(messages)
    return [*_joined(messages[:first]), *messages[first:]]


def no_system(messages: list[Message]) -> list[Message]:
    """What the system says at the beginning opens the first message, which is the user's."""
    first = _beginning(messages)
    return [*_joined({**message, "role": "user"} for message in messages[:first]), *messages[first:]]


def results_to_user(messages: list[Message]) -> list[Message]:
    """The result of a call that is not in the conversation is the user's."""
    called: set[JsonValue] = set()
    made: list[Message] = []
    for message in messages:
        called.update(cast("str", call.get("id")) for call in calls_of(message))
        if message["role"] == "tool" and message.get("tool_call_id") not in called:
            message = _said("user", text_of(message))
        made.append(message)
    return made


def calls_to_text(messages: list[Message]) -> list[Message]:
    """Calls are JSON in the assistant's text, and their results are the user's."""
    made: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            message = _said("user", text_of(message))
        elif calls := calls_of(message):
            said = [text_of(message), *(_written(call) for call in calls)]
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            message = {**kept, "content": "\n".join(filter(None, said))}
        made.append(message)
    return made


def content_apart(messages: list[Message]) -> list[Message]:
    """What the assistant says before a call is a message of its own."""
    made: list[Message] = []
    for message in messages:
        if calls_of(message) and text_of(message):
            made.append(_said("assistant", text_of(message)))
            message = {**message, "content": ""}
        made.append(message)
    return made


def one_call_each(messages: list[Message]) -> list[Message]:
    """A message has one call, and the call's result follows it."""
    made: list[Message] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = calls_of(message)
        if len(calls) < 2:
            made.append(message)
            continue
        results: list[Message] = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.append(messages[at])
            at += 1
        for call in calls:
            made.append({**message, "tool_calls": [call]})
            made += [result for result in results if result.get("tool_call_id") == call.get("id")]
            message = {"role": "assistant", "content": message["content"] and ""}  # said once, before the first
        ids = [call.get("id") for call in calls]
        made += [result for result in results if result.get("tool_call_id") not in ids]
    return made


def no_empty_reply(messages: list[Message]) -> list[Message]:
    """The assistant's messages without content and calls are left out, except a last one, which may be continued."""
    return [
        message
        for message in messages
        if message["role"] != "assistant" or text_of(message) or calls_of(message) or message is messages[-1]
    ]


def one_turn(messages: list[Message]) -> list[Message]:
    """Neighbours of the user's, or of the assistant's without calls, are one message."""
    made: list[Message] = []
    for message in messages:
        before = made[-1] if made else None
        if (
            before is not None
            and before["role"] == message["role"]
            and message["role"] in ("user", "assistant")
            and not calls_of(before)
            and not calls_of(message)
        ):
            made[-1] = _join(before, message)
        else:
            made.append(message)
    return made


def user_to_result(messages: list[Message]) -> list[Message]:
    """What the user says directly after a call's result goes on with the result."""
    made: list[Message] = []
    for message in messages:
        if made and made[-1]["role"] == "tool" and message["role"] == "user":
            made[-1] = _join(made[-1], {"content": text_of(message)})
        else:
            made.append(message)
    return made


def turns_in_turn(messages: list[Message]) -> list[Message]:
    """User and assistant alternate, calls and results aside, and the user begins; empty messages fill the gaps."""
    first = _beginning(messages)
    made = messages[:first]
    if not messages[first:] or messages[first]["role"] != "user":
        made.append(_said("user", ""))
    last, spoke = "user" if made[first:] else "assistant", len(made)
    for message in messages[first:]:
        role = message["role"]
        if role in ("user", "assistant") and not calls_of(message):
            if role == last == "user":
                made.append(_said("assistant", ""))
            elif role == last:
                made.insert(spoke, _said("user", ""))
            last, spoke = role, len(made) + 1
        made.append(message)
    return made


def empty_as_text(messages: list[Message]) -> list[Message]:
    """Content that is missing is empty text."""
    return [{**message, "content": ""} if message["content"] is None else message for message in messages]


def empty_as_none(messages: list[Message]) -> list[Message]:
    """Empty content beside calls is missing."""
    return [
        {**message, "content": None} if calls_of(message) and not message["content"] else message
        for message in messages
    ]


def in_parts(messages: list[Message]) -> list[Message]:
    """Content is a list of one part."""
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
"""By name, in the order in which they are applied."""


def reshaped(messages: Sequence[Message], names: Iterable[str]) -> list[Message]:
    """The messages after the reshapings of these names."""
    chosen = set(names)
    made = list(messages)
    for name, reshape in RESHAPINGS.items():
        if name in chosen:
            made = reshape(made)
    return made


def _beginning(messages: Sequence[Message]) -> int:
    """How many messages at the beginning are the system's."""
    return next((at for at, message in enumerate(messages) if message["role"] not in _SYSTEM), len(messages))


def _join(before: Message, after: Mapping[str, JsonValue]) -> Message:
    """Both as one message, with the fields of either; texts that both have follow each other."""
    made = {**before, **after}
    for key in ("content", "reasoning_content", "thinking"):
        texts = [text for each in (before, after) if isinstance(text := each.get(key), str) and text]
        if texts:
            made[key] = _BETWEEN.join(texts)
    return made


def _joined(messages: Iterable[Message]) -> list[Message]:
    made: list[Message] = []
    for message in messages:
        made = [_join(made[0], {**message, "role": made[0]["role"]})] if made else [message]
    return made


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _written(call: Mapping[str, JsonValue]) -> str:
    function = call.get("function")
    assert isinstance(function, dict)
    return json.dumps({"name": function.get("name"), "arguments": function.get("arguments")}, ensure_ascii=False)
