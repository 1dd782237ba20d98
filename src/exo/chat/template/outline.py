"""A conversation without its words: short, and like the real one in everything that a chat template looks at."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from exo.chat.template.reshaping import Message, calls_of, text_of

_REASONING = ("reasoning_content", "thinking")
_NEIGHBOURS = 3
"""Turns that a template is taken to see at once."""

Kind = tuple[object, ...]


@dataclass(slots=True)
class Outline:
    """``words`` stand for the texts and calls in ``messages``, each of which a prompt has to hold."""

    messages: list[Message] = field(default_factory=list[Message])
    words: list[str] = field(default_factory=list[str])

    def lost(self, prompt: str) -> int:
        """How many of the words the prompt does not hold."""
        return sum(word not in prompt for word in self.words)


def outline(messages: Sequence[Message]) -> Outline:
    """The outline of the conversation. Stretches that only repeat what was there before are left out."""
    made = Outline()
    ids: dict[JsonValue, str] = {}

    def word() -> str:
        made.words.append(f"w{len(made.words):05}x")
        return made.words[-1]

    def stand_in(identity: JsonValue) -> str:
        return ids.setdefault(identity, str(len(ids)).zfill(len(str(identity))))

    for message in _without_repetitions(messages):
        one: Message = {"role": message["role"], "content": message["content"]}
        if text_of(message).strip():
            one["content"] = word()
        one |= {key: "thought" for key in (*_REASONING, "name") if message.get(key)}
        if "tool_call_id" in message:
            one["tool_call_id"] = stand_in(message["tool_call_id"])
        if calls := calls_of(message):
            one["tool_calls"] = [
                {
                    "id": stand_in(call.get("id")),
                    "type": "function",
                    "function": {"name": word(), "arguments": {"of": word()}},
                }
                for call in calls
            ]
        made.messages.append(one)
    return made


def _without_repetitions(messages: Sequence[Message]) -> list[Message]:
    turns: list[list[Message]] = []
    for message in messages:
        if message["role"] == "tool" and turns:
            turns[-1].append(message)
        else:
            turns.append([message])
    kept: list[list[Message]] = []
    seen: dict[tuple[Kind, ...], int] = {}
    newest = 0
    for turn in turns:
        kept.append(turn)
        neighbours = tuple(_kind(each) for each in kept[-_NEIGHBOURS:])
        before = seen.setdefault(neighbours, len(kept))
        if before == len(kept):
            newest = before
        elif before >= newest:  # everything since then has been there before
            del kept[before:]
    return [message for turn in kept for message in turn]


def _kind(turn: Sequence[Message]) -> Kind:
    """What a template may look at in a message and the results behind it."""
    return tuple(
        (
            message["role"],
            bool(text_of(message).strip()),
            tuple(bool(message.get(key)) for key in _REASONING),
            tuple(len(str(call.get("id"))) for call in calls_of(message)),
            len(str(message.get("tool_call_id", ""))),
        )
        for message in turn
    )
