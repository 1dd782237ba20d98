"""Finds the reshapings that a conversation needs for its chat template.

A chat template is a program that may refuse messages it does not expect, or silently leave them out. Only rendering
shows which. Rendering a long conversation up to forty times would take seconds, so its outline is rendered instead: a
short conversation that looks the same to a template. Conversations of the same outline need the same reshapings.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, product

from pydantic import JsonValue

from exo.chat.template.reshaping import ChatMessage, calls_of, reshaped, text_of

Names = tuple[str, ...]
Render = Callable[[Sequence[ChatMessage]], Awaitable[str | None]]
"""Returns the prompt of the messages, or None if the template refuses them."""

ATTEMPTS: Names = (
    "short_ids",
    "developer_to_system",
    "late_system_to_user",
    "one_system",
    "no_system",
    "content_apart",
    "one_call_each",
    "no_empty_reply",
    "one_turn",
    "turns_in_turn",
    "results_to_user",
    "user_to_result",
    "calls_to_text",
)
"""The reshapings in the order in which they are tried, each with those before it. The mildest come first."""
# Spellings of the same messages. A template that needs one may be unable to take another.
_SPELLINGS: tuple[Names, ...] = ((), ("empty_as_text",), ("empty_as_none",))
_IN_PARTS: tuple[Names, ...] = (("in_parts",),)

_REASONING = ("reasoning_content", "thinking")
_NEIGHBOURS = 3
"""The number of consecutive turns that a template is assumed to compare at most."""

Kind = tuple[object, ...]


@dataclass(slots=True)
class Outline:
    """A conversation of placeholders. ``words`` stand for the texts and calls, each of which a prompt must contain."""

    messages: list[ChatMessage] = field(default_factory=list[ChatMessage])
    words: list[str] = field(default_factory=list[str])

    def lost(self, prompt: str) -> int:
        """Returns how many of the words are missing in the prompt."""
        return sum(word not in prompt for word in self.words)


async def fitting(plan: Outline, render: Render) -> Names:
    """Returns the fewest reshapings with which the template takes the conversation and loses none of it.

    If none achieve that, returns those with which it loses least; none if the template refuses everything.
    """

    async def lost(names: Names) -> int | None:
        prompt = await render(reshaped(plan.messages, names))
        return None if prompt is None else plan.lost(prompt)

    # Each reshaping may depend on those before it, so the list grows until the template takes everything.
    best: tuple[int, Names] | None = None
    counts = range(len(ATTEMPTS) + 1)
    for count, spelling in chain(product(counts, _SPELLINGS), product(counts, _IN_PARTS)):
        names = (*spelling, *ATTEMPTS[:count])
        missing = await lost(names)
        if missing is not None and (best is None or missing < best[0]):
            best = (missing, names)
        if missing == 0:
            break
    if best is None:
        return ()
    # Then reshapings that turn out unnecessary are removed one by one, the most invasive first.
    least, chosen = best
    for name in (*reversed(chosen[:-1]), *chosen[-1:]):
        fewer = tuple(each for each in chosen if each != name)
        missing = await lost(fewer)
        if missing is not None and missing <= least:
            chosen = fewer
    return chosen


def outline(messages: Sequence[ChatMessage]) -> Outline:
    """Returns the outline of the conversation.

    It keeps what templates look at: roles, whether there is text or reasoning, the number of calls, and the length of
    ids. Turns that only repeat a pattern are left out.
    """
    made = Outline()
    ids: dict[JsonValue, str] = {}

    def word() -> str:
        made.words.append(f"w{len(made.words):05}x")
        return made.words[-1]

    def stand_in(identity: JsonValue) -> str:
        return ids.setdefault(identity, str(len(ids)).zfill(len(str(identity))))

    for message in _without_repetitions(messages):
        one: ChatMessage = {"role": message["role"], "content": message["content"]}
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


def _without_repetitions(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Returns the messages without the turns that only repeat a pattern.

    An agent's conversation has hundreds of turns of a few kinds. If the last few turns are of the same kinds as the
    turns at an earlier place, and nothing new has appeared since, all turns after that place are dropped.
    """
    turns: list[list[ChatMessage]] = []
    for message in messages:
        if message["role"] == "tool" and turns:
            turns[-1].append(message)
        else:
            turns.append([message])
    kept: list[list[ChatMessage]] = []
    seen: dict[tuple[Kind, ...], int] = {}
    newest = 0
    for turn in turns:
        kept.append(turn)
        neighbours = tuple(_kind(each) for each in kept[-_NEIGHBOURS:])
        before = seen.setdefault(neighbours, len(kept))
        if before == len(kept):
            newest = before
        elif before >= newest:  # nothing new since then
            del kept[before:]
    return [message for turn in kept for message in turn]


def _kind(turn: Sequence[ChatMessage]) -> Kind:
    """Returns what a template may look at in a message and the results after it."""
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
