"""Twice the text is twice the work, whatever the text: counted in calls made while reading it, not in seconds."""

import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType

import pytest

from exo.chat.grammar.tool_schema import Tool
from tests.support.replies import ONE_CALL, TOOLS, form
from tests.support.tagged_calls import DONE, END, KEY, call
from tests.support.tagged_calls import TOOLS as VALUE_TOOLS

SIZE = 600
NAMES = sorted(ONE_CALL)


def hostile(name: str) -> dict[str, str]:
    """Texts by what is wrong with them; each is repeated to the length that is wanted."""
    call = ONE_CALL[name]
    begin = (form(name).begin or ("<|channel|>commentary to=functions.f<|message|>",))[0]
    return {
        "openings": begin,
        "openings on lines": begin + "\n",
        "half markers": begin[:-1],
        "calls without end": call[: call.index("3")],
        "angles": "<",
        "braces": "{",
        "brackets": "[",
        "quotes": '"',
        "backslashes": "\\",
        "strings": begin + '{"name": "',
        "keys": '{"name": {"name": ',
        "white space": " \n",
        "thoughts": "<think>",
        "fences": "```",
        "bars": "<|",
    }


def hostile_values(name: str) -> dict[str, tuple[str, str]]:
    """Values by what is wrong with them: how they begin, and what is repeated in them."""
    text = call(name, "write", path="x", content="")
    begin = text[: text.rindex(END[name])]
    other, known = call(name, "f", a="x"), call(name, "write", path="x")
    return {
        "ends": (begin, END[name]),
        "ends on lines": (begin, END[name] + "\n"),
        "ends of calls": (begin, DONE[name] + "\n"),
        "ends of calls in text": (begin, f"{DONE[name]} x "),
        "keys": (begin, KEY[name]),
        "calls": (begin, other),
        "calls of a tool": (begin, known),
        "calls of a tool in text": (begin, f"{known[: known.rindex('</')]} x "),
        "drafts": ("<think>", known),
    }


@pytest.mark.parametrize("name", sorted(END))
@pytest.mark.parametrize("at_once", [True, False])
def test_twice_the_value_is_twice_the_work(name: str, at_once: bool) -> None:
    for kind, (begin, piece) in hostile_values(name).items():
        once, twice = (begin + (piece * length)[:length] for length in (4 * SIZE, 8 * SIZE))
        first, second = (reading(name, [text] if at_once else text, VALUE_TOOLS) for text in (once, twice))
        assert second <= 2.2 * first + 400, kind
        assert first <= 4 * 60 * SIZE, kind


def work(run: Callable[[], object]) -> int:
    """Calls of functions, Python's and C's, that ``run`` makes."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def reading(name: str, pieces: Iterable[str], tools: Sequence[Tool] = TOOLS) -> int:
    parser = form(name).parser(tools=tools, in_reasoning=False)

    def run() -> None:
        for piece in pieces:
            parser.push(piece)
        parser.finish()

    return work(run)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at_once", [True, False])
def test_twice_the_text_is_twice_the_work(name: str, at_once: bool) -> None:
    for kind, piece in hostile(name).items():
        once, twice = ((piece * length)[:length] for length in (SIZE, 2 * SIZE))
        first, second = (reading(name, [text] if at_once else text) for text in (once, twice))
        assert second <= 2.2 * first + 200, kind
        assert first <= 60 * SIZE, kind


CALL = '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}'


@pytest.mark.parametrize("name", ["llama3", "gemma"])
@pytest.mark.parametrize(
    "piece", [f"{CALL}\n", f"{CALL}x\n", "\n{", '\n{"name": "get_weather", ', "\n```\n{", "\n \n{ "]
)
def test_twice_the_calls_after_a_sentence_are_twice_the_work(name: str, piece: str) -> None:
    for at_once in (True, False):
        texts = ("So:\n" + (piece * size)[:size] for size in (2000, 4000))
        first, second = (reading(name, [text] if at_once else text) for text in texts)
        assert second <= 2.2 * first + 400
