"""One JSON object in a stream: where it ends, and that nothing else passes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from exo.chat.output.json_scanner import DEEPEST, JsonObject

VALUES: st.SearchStrategy[JsonValue] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=5)


def read(text: str, size: int = 1) -> tuple[JsonObject, str]:
    """The object, and what of the text came after it."""
    found = JsonObject()
    for at in range(0, len(text), size):
        piece = text[at : at + size]
        if (end := found.read(piece, 0)) < len(piece):
            return found, text[at + end :]
    return found, ""


@settings(max_examples=60)
@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]), st.integers(1, 50), st.text())
def test_an_object_ends_where_it_ends(
    value: dict[str, JsonValue], ascii_only: bool, indent: int | None, size: int, after: str
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    found, rest = read(text + after, size)
    assert found.whole
    assert found.taken() == text
    assert rest == after


@settings(max_examples=60)
@given(OBJECTS, st.data())
def test_a_beginning_is_neither_whole_nor_broken(value: dict[str, JsonValue], data: st.DataObject) -> None:
    text = json.dumps(value)
    length = data.draw(st.integers(0, len(text) - 1))
    found, _ = read(text[:length], 7)
    assert not found.whole
    assert not found.broken
    assert found.taken() + found.pending() == text[:length]


PIECES = ["{", "}", "[", "]", ",", ":", '"', "\\", '"a"', "1", "-", "0", ".", "e", "true", "nul", " ", "\n", "u12", "é"]


@settings(max_examples=60)
@given(st.lists(st.sampled_from(PIECES)))
def test_what_is_whole_is_json_and_json_is_whole(pieces: list[str]) -> None:
    text = "{" + "".join(pieces)
    found, rest = read(text)
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(text)
    except json.JSONDecodeError:
        assert not found.whole or isinstance(json.loads(found.taken()), dict), "what models write nearly so"
    else:
        assert found.whole
        assert rest == text[end:]
        assert json.loads(found.taken()) == value


@pytest.mark.parametrize(
    "text",
    ["[1]", "1", '{"a": NaN}', '{"a": Infinity}', '{"a": 01}', "{a: 1}", '{"a",}', '{"a": 1,,}', "{,}", '{"a" 1}'],
)
def test_what_is_no_object_is_broken(text: str) -> None:
    found, _ = read(text + " ")
    assert found.broken
    assert not found.whole


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1,}', {"a": 1}),
        ('{"a": [1, 2, ] , }', {"a": [1, 2]}),
        ("{'a': 'it\\'s \"x\"', 'b': [True, False, None]}", {"a": 'it\'s "x"', "b": [True, False, None]}),
        ('{"a": "\\d+\\x\\u12g"}', {"a": "\\d+\\x\\u12g"}),
        ('{"a": "\\\'x\\\'"}', {"a": "'x'"}),
        ('{"a": "x\\\ny"}', {"a": "x\\\ny"}),
    ],
)
@pytest.mark.parametrize("size", [1, 100])
def test_what_models_write_for_json_is_json(text: str, value: JsonValue, size: int) -> None:
    found, rest = read(text + "}", size)
    assert (found.whole, rest) == (True, "}")
    assert json.loads(found.taken()) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1', {"a": 1}),
        ('{"a": [{"b": tru', None),
        ('{"a": [{"b": true', {"a": [{"b": True}]}),
        ('{"a": "x', None),
    ],
)
def test_closing_brackets_alone_can_be_added(text: str, value: JsonValue) -> None:
    found, _ = read(text)
    assert found.complete() == (value is not None)
    assert value is None or json.loads(found.taken()) == value


@pytest.mark.parametrize("text", ['{"a": 1,', '{"a":', '{"a"', "{"])
def test_nothing_but_closing_brackets_is_added(text: str) -> None:
    assert not read(text)[0].complete()


def test_control_characters_in_strings_are_escaped() -> None:
    found, _ = read('{"a": "x\n\ty"}')
    assert found.taken() == '{"a": "x\\u000a\\u0009y"}'


def test_nesting_has_an_end() -> None:
    assert read('{"a":' * DEEPEST + "1" + "}" * DEEPEST)[0].whole
    assert read('{"a":' * (DEEPEST + 1))[0].broken
