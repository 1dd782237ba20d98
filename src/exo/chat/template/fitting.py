"""Finds the reshapings that a conversation needs for its chat template, by rendering the conversation's outline."""

from collections.abc import Awaitable, Callable, Sequence
from itertools import chain, product

from exo.chat.template.outline import Outline
from exo.chat.template.reshaping import Message, reshaped

Names = tuple[str, ...]
Render = Callable[[Sequence[Message]], Awaitable[str | None]]
"""The prompt of these messages; None where the template does not take them."""

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
"""The reshapings in the order in which they are tried, each with those before it: what changes least comes first."""
_SPELLINGS: tuple[Names, ...] = ((), ("empty_as_text",), ("empty_as_none",))
_IN_PARTS: tuple[Names, ...] = (("in_parts",),)
"""Ways to write the same messages. A template that needs one may be unable to take another."""


async def fitting(plan: Outline, render: Render) -> Names:
    """The fewest reshapings with which the template takes the conversation of this outline and loses none of it.

    Where no choice does both, it is the one with which least is lost; none at all where the template takes nothing.
    """

    async def lost(names: Names) -> int | None:
        prompt = await render(reshaped(plan.messages, names))
        return None if prompt is None else plan.lost(prompt)

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
    least, chosen = best
    for name in (*reversed(chosen[:-1]), *chosen[-1:]):
        fewer = tuple(each for each in chosen if each != name)
        missing = await lost(fewer)
        if missing is not None and missing <= least:
            chosen = fewer
    return chosen
