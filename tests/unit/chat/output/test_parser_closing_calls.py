"""JSON calls without a marker that come after a sentence, and JSON in an answer that is no call."""

import json

import pytest

from exo.chat.output.events import Arguments, BrokenCall, Content, ToolCall
from exo.chat.output.registry import FORMATS
from tests.support.replies import TIME, TOOLS, read, text_of

BY = ["llama3", "llama4", "gemma"]
CALL = '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}'
ARGUMENTS = {"city": "Paris", "days": 3}
SENTENCE = "I will look it up."


@pytest.mark.parametrize("name", BY)
@pytest.mark.parametrize(
    "text",
    [
        f"{SENTENCE}\n{CALL}",
        f"{SENTENCE}\n\n  {CALL}\n",
        f"{SENTENCE}\n{json.dumps(json.loads(CALL), indent=2)}",
        f"{SENTENCE}\n{CALL.replace('parameters', 'arguments')}",
        SENTENCE + '\n{"type": "function", "name": "get_weather", "parameters": {"city": "Paris", "days": 3,}}',
        SENTENCE + '\n{"parameters": {"city": "Paris", "days": 3}, "name": "get_weather"}',
    ],
)
def test_a_call_after_a_sentence(name: str, text: str) -> None:
    for pieces in (text, [text]):
        content, call, arguments = read(FORMATS[name], pieces)
        assert (content, call) == (Content(SENTENCE), ToolCall(0, "get_weather"))
        assert isinstance(arguments, Arguments)
        assert json.loads(arguments.text) == ARGUMENTS


@pytest.mark.parametrize("between", ["\n", "; ", ";\n"])
def test_several_calls_after_a_sentence(between: str) -> None:
    parts = read(FORMATS["llama3"], f'{SENTENCE}\n{CALL}{between}{{"name": "time", "parameters": {{}}}}')
    assert [part.name for part in parts if isinstance(part, ToolCall)] == ["get_weather", "time"]
    assert text_of(parts, Content) == SENTENCE


def test_a_call_after_a_code_block() -> None:
    parts = read(FORMATS["llama3"], f"See:\n```\n{{}}\n```\n{CALL}")
    assert parts[1:] == [ToolCall(0, "get_weather"), Arguments(0, '{"city": "Paris", "days": 3}')]


@pytest.mark.parametrize("name", BY)
@pytest.mark.parametrize(
    "text",
    [
        f"It would be called like this:\n{CALL}\nThen the answer comes.",
        f"Like this:\n{CALL}\n{CALL}\nDone.",
        f"Call it as {CALL}",
        f"Like this:\n~~~\n{CALL}\n~~~",
        f"Like this:\n```python\n{CALL}",
        f"Like this:\n```\nx\n\n{CALL}\n```\n",
        f"A list:\n[{CALL}]",
        'Her data:\n{"name": "John", "parameters": {"city": "Paris"}}',
        'Incomplete:\n{"name": "get_weather"}',
        'Misses the city:\n{"name": "get_weather", "parameters": {"days": 3}}',
        'Another kind of object:\n{"name": "get_weather", "price": 3}',
        'No object:\n{"name": "get_weather", "parameters": [1]}',
        'No JSON:\n{"name": "get_weather", "parameters": {"city": x y}}',
        'Other arguments:\n{"name": "get_weather", "parameters": {"city": "Paris", "height": 3}}',
        "Code:\nint main()\n{\n  return 0;\n}\n",
        "Open:\n{",
    ],
)
def test_json_that_is_no_call_is_content(name: str, text: str) -> None:
    for pieces in (text, [text]):
        assert read(FORMATS[name], pieces) == [Content(text)]


def test_a_call_that_the_limit_cuts_off_is_not_shown() -> None:
    for length in range(CALL.index("weather") + len("weather"), len(CALL)):
        parts = read(FORMATS["llama3"], f"{SENTENCE}\n{CALL[:length]}", cut_off=True)
        assert parts == [Content(f"{SENTENCE}\n")]


def test_no_call_is_reported_before_it_is_known_to_be_one() -> None:
    parts = read(FORMATS["llama3"], f"{SENTENCE}\n{CALL[:-1]}")
    assert not any(isinstance(part, BrokenCall | ToolCall) for part in parts)
    assert text_of(parts, Content) == f"{SENTENCE}\n{CALL[:-1]}"


def test_a_request_without_tools_and_other_families_have_content_only() -> None:
    text = f"{SENTENCE}\n{CALL}"
    assert read(FORMATS["llama3"], text, ()) == read(FORMATS["hermes"], text) == [Content(text)]
    assert read(FORMATS["llama3"], text, (TIME,)) == [Content(text)]


def test_other_json_is_held_no_longer_than_its_first_members() -> None:
    parser = FORMATS["llama3"].parser(tools=TOOLS, in_reasoning=False)
    for text in ('Here:\n{"answer": 4', ', "more": {"name": "J', 'ohn"}}\n{"name": "John"', "\n{\nx"):
        shown = "".join(part.text for part in parser.push(text) if isinstance(part, Content))
        assert shown.strip() == text.strip()
