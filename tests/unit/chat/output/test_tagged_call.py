"""Calls with an argument between tags: where a value ends, whatever is in it, and how early it is passed on."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from exo.chat.output.events import Arguments, BrokenCall, Content, Part, ToolCall
from exo.chat.output.registry import FORMATS
from tests.support.replies import read, text_of
from tests.support.tagged_calls import DONE, END, KEY, TOOLS, call

NAMES = ("qwen3-coder", "glm", "minimax")


def calls(parts: list[Part]) -> list[tuple[str, JsonValue]]:
    assert not any(isinstance(part, BrokenCall) for part in parts)
    return [
        (part.name, json.loads("".join(p.text for p in parts if isinstance(p, Arguments) and p.index == part.index)))
        for part in parts
        if isinstance(part, ToolCall)
    ]


def both_ways(name: str, text: str) -> list[Part]:
    whole = read(FORMATS[name], [text], TOOLS)
    assert read(FORMATS[name], text, TOOLS) == whole
    return whole


def values(name: str) -> list[str]:
    end, key, done = END[name], KEY[name], DONE[name]
    return [
        f"a{end}b",
        f"a\n{end}\nb",
        f"{end}",
        f"{end}{end}",
        f'if "{key}" in text or "{end}" in text:\n    pass',
        f"{end}\n{key}other",
        f"ends with {done} as shown",
        f"ends with {done}\n\nas shown",
        call(name, "f", a="x"),
        f"An example:\n{call(name, 'f', a='x', b='y')}\nand one more:\n{call(name, 'g')}\ndone",
        f"of the same tool:\n{call(name, 'write', path='x', content='y')}\ndone",
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", range(11))
@pytest.mark.parametrize("order", ["path first", "content first", "twice"])
def test_a_value_may_contain_the_tags_of_calls(name: str, at: int, order: str) -> None:
    value = values(name)[at]
    arguments = {"path": "a.py", "content": value}
    if order == "content first":
        arguments = {"content": value, "path": "a.py"}
    text = call(name, "write", **arguments)
    expected = [("write", arguments)]
    if order == "twice":
        text, expected = f"{text}\n{text}", expected * 2
    parts = both_ways(name, text)
    assert calls(parts) == expected
    assert text_of(parts, Content) == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_end_of_a_value_is_at_the_next_argument_or_the_end(name: str) -> None:
    text = call(name, "look", place="Paris", day="5")
    without_first = text.replace(END[name], "", 1)
    assert calls(both_ways(name, without_first)) == [("look", {"place": "Paris", "day": 5})]
    without_any = text.replace(END[name], "")
    assert calls(both_ways(name, without_any)) == [("look", {"place": "Paris", "day": 5})]
    assert calls(both_ways(name, f"{without_any}\n{without_any}")) == [("look", {"place": "Paris", "day": 5})] * 2


@pytest.mark.parametrize("name", NAMES)
def test_closing_tags_may_be_missing_at_the_end_of_a_reply(name: str) -> None:
    text = call(name, "look", place="Paris", day="5")
    for length in range(text.rindex(END[name]) + len(END[name]), len(text) + 1):
        parts = both_ways(name, text[:length])
        assert calls(parts) == [("look", {"place": "Paris", "day": 5})]
        assert text_of(parts, Content) == ""


@pytest.mark.parametrize("name", NAMES)
def test_text_after_a_call_without_its_outer_end_is_content(name: str) -> None:
    text = call(name, "look", place="Paris")
    bare = text[: text.rindex("\n</" if name != "glm" else "</tool_call>")] if name != "glm" else text
    parts = both_ways(name, f"{bare}\nNow I wait.")
    assert calls(parts) == [("look", {"place": "Paris"})]
    assert text_of(parts, Content) == "Now I wait."
    parts = both_ways(name, f"{bare}\nNow once more.\n{text}")
    assert calls(parts) == [("look", {"place": "Paris"})] * 2
    assert text_of(parts, Content) == "Now once more."


@pytest.mark.parametrize("name", NAMES)
def test_half_a_value_is_never_a_whole_call(name: str) -> None:
    text = call(name, "write", path="a.py", content="x = 1\ny = 2")
    for length in range(text.index("x = 1"), text.index("y = 2") + 5):
        for cut_off in (True, False):
            parts = read(FORMATS[name], [text[:length]], TOOLS, cut_off=cut_off)
            assert BrokenCall(0, cut_off) in parts
            assert text_of(parts, Content) == ("" if cut_off else text[:length])


@pytest.mark.parametrize("name", NAMES)
def test_json_may_contain_tags_in_its_strings(name: str) -> None:
    meta = {"a": END[name], "b": [f'\\"{END[name]}', {"c": DONE[name]}]}
    text = call(name, "write", path="a.py", meta=json.dumps(meta), content="x")
    assert calls(both_ways(name, text)) == [("write", {"path": "a.py", "meta": meta, "content": "x"})]


@pytest.mark.parametrize("name", NAMES)
def test_a_json_call_between_the_tags_is_read(name: str) -> None:
    begin = FORMATS[name].begin[0]
    text = f'{begin}\n{{"name": "look", "arguments": {{"place": "Paris"}}}}\n{begin.replace("<", "</")}'
    parts = both_ways(name, text)
    assert calls(parts) == [("look", {"place": "Paris"})]
    assert text_of(parts, Content) == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_passed_on_while_it_is_written(name: str) -> None:
    text = call(name, "write", path="a.py", content="\n".join(f"line {n}" for n in range(100)))
    parser = FORMATS[name].parser(tools=TOOLS, in_reasoning=False)
    parts = parser.push(text[: text.index("line 50")])
    told = "".join(part.text for part in parts if isinstance(part, Arguments))
    assert told.endswith("line 49")
    assert json.loads(told + '"}')["content"].startswith("line 0\nline 1\n")


FRAGMENTS = {name: [END[name], KEY[name], DONE[name], "\n", " ", "x", '"', "\\", call(name, "f")] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(data=st.data())
def test_no_outcome_depends_on_how_the_text_is_cut(name: str, data: st.DataObject) -> None:
    pieces = data.draw(st.lists(st.sampled_from(FRAGMENTS[name]), max_size=8))
    value = "".join(pieces)
    text = call(name, data.draw(st.sampled_from(["write", "f"])), path=value, meta=value, content=value)
    text = text[: data.draw(st.integers(len(text) // 2, len(text)))]
    cut_off = data.draw(st.booleans())
    whole = read(FORMATS[name], [text], TOOLS, cut_off=cut_off)
    assert read(FORMATS[name], text, TOOLS, cut_off=cut_off) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    cut = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(FORMATS[name], cut, TOOLS, cut_off=cut_off) == whole


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_that_the_tool_does_not_have_is_one_unless_it_comes_within_a_long_text(name: str) -> None:
    text = call(name, "look", place="Paris", zip="007", day="5")
    assert calls(both_ways(name, text)) == [("look", {"place": "Paris", "zip": "007", "day": 5})]
    key = {"qwen3-coder": ">\n", "glm": "</arg_key><arg_value>", "minimax": '">'}[name]
    arguments = {"path": "a.py", "content": f"a\nb{END[name]}\n{KEY[name]}other{key}c"}
    assert calls(both_ways(name, call(name, "write", **arguments))) == [("write", arguments)]
