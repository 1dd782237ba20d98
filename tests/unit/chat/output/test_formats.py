"""Replies with calls of tools in every format: what is read, when, and what of a call that is none."""

import json
from collections.abc import Sequence

import pytest
from pydantic import JsonValue

from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.chat.output.registry import FORMATS
from tests.support.replies import BAR, MARKED, ONE_CALL, THE_CALL, TOOLS, form, merged, read, text_of

NAMES = sorted(ONE_CALL)


def calls(parts: Sequence[Part]) -> list[tuple[str, JsonValue]]:
    texts = {
        part.index: "".join(p.text for p in parts if isinstance(p, Arguments) and p.index == part.index)
        for part in parts
        if isinstance(part, ToolCall)
    }
    names = [part.name for part in parts if isinstance(part, ToolCall)]
    return [(name, json.loads(texts[index])) for index, name in enumerate(names)]


def test_every_format_is_tested() -> None:
    assert set(ONE_CALL) == set(FORMATS) - {"none"}


@pytest.mark.parametrize("name", NAMES)
def test_a_call_is_read(name: str) -> None:
    assert read(form(name), [ONE_CALL[name]]) == THE_CALL


@pytest.mark.parametrize("name", NAMES)
def test_a_call_is_read_the_same_character_by_character(name: str) -> None:
    assert read(form(name), ONE_CALL[name]) == THE_CALL


@pytest.mark.parametrize("name", NAMES)
def test_without_tools_a_call_is_text(name: str) -> None:
    parts = read(form(name), ONE_CALL[name], ())
    assert not any(isinstance(part, ToolCall) for part in parts)
    shown = '{"city": "Paris", "days": 3}' if name == "harmony" else ONE_CALL[name]
    assert parts == [Content(shown)]


@pytest.mark.parametrize("name", MARKED)
def test_text_before_and_after_calls_is_content_without_the_space_between(name: str) -> None:
    text = f"  Let me look.\n\n{ONE_CALL[name]}\n{ONE_CALL[name]}\n\nDone. "
    again = [ToolCall(1, "get_weather"), Arguments(1, '{"city": "Paris", "days": 3}')]
    assert read(form(name), text) == [Content("  Let me look."), *THE_CALL, *again, Content("Done. ")]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_call_does_not_wait_for_its_end(name: str) -> None:
    text = ONE_CALL[name]
    parser = form(name).parser(tools=TOOLS, in_reasoning=False)
    parts = merged(parser.push(text[: text.index("3")]))
    assert parts[0] == THE_CALL[0]
    assert isinstance(parts[1], Arguments)
    assert parts[1].text.startswith('{"city": "Paris"')


@pytest.mark.parametrize("name", NAMES)
def test_a_call_cut_off_anywhere_shows_no_markup_and_is_not_whole(name: str) -> None:
    text = ONE_CALL[name]
    for length in range(len(text)):
        parts = read(form(name), [text[:length]], cut_off=True)
        if not any(isinstance(part, ToolCall) for part in parts):
            assert len(text_of(parts, Content)) < (2 if name in MARKED else text.index("get_weather") + 12), text[
                :length
            ]
        elif merged(parts) != THE_CALL:
            arguments = parts[1].text if isinstance(parts[1], Arguments) else ""
            assert '{"city": "Paris", "days": 3}'.startswith(arguments)
            assert not arguments.endswith("}")
            assert parts == [THE_CALL[0], *([Arguments(0, arguments)] if arguments else []), BrokenCall(0, True)]


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_its_model_does_not_end_is_text_or_completed(name: str) -> None:
    text = ONE_CALL[name]
    for length in range(len(text)):
        parts = read(form(name), [text[:length]])
        broken = [part for part in parts if isinstance(part, BrokenCall)]
        if not broken and any(isinstance(part, ToolCall) for part in parts):
            assert [name for name, _ in calls(parts)] == ["get_weather"]
        elif name != "harmony":
            assert broken in ([], [BrokenCall(0, False)])
            assert text_of(parts, Content) == text[:length]


@pytest.mark.parametrize("name", MARKED)
def test_a_call_of_an_unknown_function_is_a_call(name: str) -> None:
    text = ONE_CALL[name].replace("get_weather", "other")
    assert read(form(name), text) == [ToolCall(0, "other"), THE_CALL[1]]


@pytest.mark.parametrize("name", MARKED)
def test_what_only_begins_as_a_call_is_content(name: str) -> None:
    text = f"{form(name).begin[0]} is how one begins; see {form(name).begin[0]}"
    assert read(form(name), text) == [Content(text)]
    assert read(form(name), [text]) == [Content(text)]


@pytest.mark.parametrize("name", [name for name in NAMES if '{"city"' in ONE_CALL[name]])
def test_a_call_with_broken_json_is_content(name: str) -> None:
    text = "Look:\n" * (name in MARKED) + ONE_CALL[name].replace('"days": 3', '"days": tree')
    parts = read(form(name), text)
    before = [Content("Look:")] * (name in MARKED)
    call = [ToolCall(0, "get_weather"), Arguments(0, '{"city": "Paris", "days": ')]
    assert parts[:-1] == [*before, *call, BrokenCall(0, False)]
    content = text_of(parts, Content)
    assert text.startswith(content)
    assert text.index("tree") < len(content)


VARIANTS: list[tuple[str, str, list[tuple[str, JsonValue]]]] = [
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("f", {})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g"}', [("f", {}), ("g", {})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', [("f", {"a": "x\ny"})]),
    ("hermes", '<tool_call>{"name": "\\u0066", "arguments": {}}</tool_call>', [("f", {})]),
    ("llama3", '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}', [("f", {})]),
    ("llama3", '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}\n', [("f", {}), ("g", {})]),
    ("mistral", "[TOOL_CALLS]f[CALL_ID]abc[ARGS]{}[TOOL_CALLS]g{}", [("f", {}), ("g", {})]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "x"}]', [("f", {})]),
    ("gemma", "[f(a=[1, 'x'], b={'k': None}), g()]", [("f", {"a": [1, "x"], "b": {"k": None}}), ("g", {})]),
    ("gemma", "[f(a=[1, 2,], b={'k': (1,),},), g()]", [("f", {"a": [1, 2], "b": {"k": [1]}}), ("g", {})]),
    ("gemma", r"[f(a='\d+ it\'s \\ \u00e9\t\q')]", [("f", {"a": "\\d+ it's \\ é\t\\q"})]),
    ("gemma4", "<|tool_call>call:f{a:[1,],}<tool_call|>", [("f", {"a": [1]})]),
    ("gemma", '{"name": "f", "parameters": {"a": true}}', [("f", {"a": True})]),
    ("gemma", '```json\n{"name": "f", "parameters": {}}\n```', [("f", {})]),
    ("gemma", "```tool_code\nprint(f(a='it\\'s', b=(True, -1.5)))\n```", [("f", {"a": "it's", "b": [True, -1.5]})]),
    ("gemma", "```tool_code\nf(a=1)\ng(b='x,y)')\n```", [("f", {"a": 1}), ("g", {"b": "x,y)"})]),
    ("gemma4", '<|tool_call>call:f{a:{k:<|"|>"},<|"|>,n:[1]}}<tool_call|>', [("f", {"a": {"k": '"},', "n": [1]}})]),
    ("gemma4", "<|tool_call>call:f{a:1}call:g{}<tool_call|>", [("f", {"a": 1}), ("g", {})]),
    ("gemma4", "<|tool_call>call:f{},\ncall:g{b:2}\n<tool_call|>", [("f", {}), ("g", {"b": 2})]),
    ("gemma4", "<|tool_call>call:f{}call:g{}<tool_call|><|tool_call>call:h{}", [("f", {}), ("g", {}), ("h", {})]),
    ("function-gemma", "<start_function_call>call:f{}call:g{}<end_function_call>", [("f", {}), ("g", {})]),
    ("qwen3-coder", "<tool_call>\n<function=time>\n</function>\n</tool_call>", [("time", {})]),
    (
        "qwen3-coder",
        "<tool_call><function=get_weather><parameter=city>\n\n3\n\n</parameter><parameter=days>3</parameter>"
        "<parameter=unit>C</parameter></function></tool_call>",
        [("get_weather", {"city": "\n3\n", "days": 3, "unit": "C"})],
    ),
    ("glm", "<tool_call>time</tool_call><tool_call>time\n</tool_call>", [("time", {}), ("time", {})]),
    ("glm", "<tool_call>f<arg_key>a</arg_key><arg_value>[1]</arg_value></tool_call>", [("f", {"a": [1]})]),
    ("glm", "<tool_call>f<arg_key>a</arg_key><arg_value>True</arg_value></tool_call>", [("f", {"a": True})]),
    (
        "minimax",
        '<minimax:tool_call><invoke name="time"></invoke><invoke name="f"></invoke></minimax:tool_call>',
        [("time", {}), ("f", {})],
    ),
    ("lfm2", "<|tool_call_start|>[f(a='it's', b=\"x\")]<|tool_call_end|>", [("f", {"a": "it's", "b": "x"})]),
    (
        "minicpm5",
        '<function name="f"><param name="a"><![CDATA[1 < 2</param>\n3]]></param><param name="b">x</param></function>',
        [("f", {"a": "1 < 2</param>\n3", "b": "x"})],
    ),
    (
        "deepseek-v3.2",
        ONE_CALL["deepseek-v3.2"].replace('days" string="false">3', 'zip" string="true">007'),
        [("get_weather", {"city": "Paris", "zip": "007"})],
    ),
    (
        "deepseek-v4",
        ONE_CALL["deepseek-v4"].replace('city" string="true">Paris', 'l" string="false">[7, "</parameter>"]'),
        [("get_weather", {"l": [7, "</parameter>"], "days": 3})],
    ),
    ("kimi-k3", ONE_CALL["kimi-k3"].replace(' type="number"', ""), [("get_weather", {"city": "Paris", "days": 3})]),
    (
        "kimi-k3",
        '<|open|>tools<|sep|><|open|>call tool="a&amp;&quot;b" index="1"<|sep|><|open|>json type="object"'
        '<|sep|>{"k": 1}<|close|>json<|sep|><|close|>call<|sep|><|close|>tools<|sep|>',
        [('a&"b', {"k": 1})],
    ),
    (
        "cohere",
        "<|START_ACTION|>[" + '{"tool_call_id": "0", "tool_name": "f", "parameters": {}},\n' * 2 + "]<|END_ACTION|>",
        [("f", {}), ("f", {})],
    ),
    ("lfm2", '<|tool_call_start|>[{"name": "f", "arguments": {}}]<|tool_call_end|>', [("f", {})]),
    (
        "lfm2",
        "<|tool_call_start|>[mcp.read-file(a=None), g()]<|tool_call_end|>",
        [("mcp.read-file", {"a": None}), ("g", {})],
    ),
    (
        "olmo3",
        "<function_calls>\nf(a=true)\ng(b=[1, 'x'])\n</function_calls>",
        [("f", {"a": True}), ("g", {"b": [1, "x"]})],
    ),
    ("pythonic", "<|python_start|>[f(a=1)]<|python_end|>", [("f", {"a": 1})]),
    ("llama4", '<|python_start|>{"name": "f", "parameters": {}}<|python_end|>', [("f", {})]),
    (
        "minimax-m3",
        ']<]minimax[>[<tool_call>]<]minimax[>[<invoke name="f">]<]minimax[>[<a>]<]minimax[>[<k>true]<]minimax[>[</k>'
        "]<]minimax[>[<l>]<]minimax[>[<item>1]<]minimax[>[</item>]<]minimax[>[<item><x>]<]minimax[>[</item>"
        "]<]minimax[>[</l>]<]minimax[>[</a>]<]minimax[>[</invoke>]<]minimax[>[</tool_call>",
        [("f", {"a": {"k": True, "l": [1, "<x>"]}})],
    ),
    ("harmony", " to=functions.f<|channel|>commentary json<|message|>{}<|call|>", [("f", {})]),
    ("deepseek-v3.1", ONE_CALL["deepseek-v3"], [("get_weather", {"city": "Paris", "days": 3})]),
    (
        "deepseek-v3.1",
        f"<{BAR}tool▁calls▁begin{BAR}>"
        + "".join(f"<{BAR}tool▁call▁begin{BAR}>{n}<{BAR}tool▁sep{BAR}>{{}}<{BAR}tool▁call▁end{BAR}>" for n in "fg")
        + f"<{BAR}tool▁calls▁end{BAR}>",
        [("f", {}), ("g", {})],
    ),
    (
        "kimi",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_call_begin|>g<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        [("f", {}), ("g", {})],
    ),
]


UNWRAPPED: list[tuple[str, str, list[tuple[str, JsonValue]]]] = [
    ("qwen3-coder", "<function=time>\n</function>\n</tool_call>", [("time", {})]),
    ("qwen3-coder", "<function=time></function><function=time></function>", [("time", {}), ("time", {})]),
    ("minimax", '<invoke name="time"></invoke></minimax:tool_call>', [("time", {})]),
    ("kimi", "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>", [("f", {})]),
    (
        "deepseek-v3.1",
        f"<{BAR}tool▁call▁begin{BAR}>f<{BAR}tool▁sep{BAR}>{{}}<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}>",
        [("f", {})],
    ),
]
"""With the markers around all calls left out."""

LOOSE_JSON: list[tuple[str, str, list[tuple[str, JsonValue]]]] = [
    ("hermes", "<tool_call>{'name': 'f', 'arguments': {'a': True,},}</tool_call>", [("f", {"a": True})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": {"b": 1}\n</tool_call>', [("f", {"a": {"b": 1}})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}}\n</tool_call>', [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1[TOOL_CALLS]g[ARGS]{"b": 2,}', [("f", {"a": 1}), ("g", {"b": 2})]),
    ("mistral-array", '[TOOL_CALLS][{"name": "f", "arguments": {}},]', [("f", {})]),
]


@pytest.mark.parametrize(("name", "text", "expected"), [*VARIANTS, *UNWRAPPED, *LOOSE_JSON])
def test_variants_that_models_write(name: str, text: str, expected: list[tuple[str, JsonValue]]) -> None:
    for pieces in (text, [text]):
        parts = read(form(name), pieces)
        assert calls(parts) == expected
        assert text_of(parts, Content) == ""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3", '{"answer": 42}'),
        ("llama3", '{"name": "John", "age": 3}'),
        ("llama3", '{"name": "f"}'),
        ("llama3", 'Use {"name": "f", "parameters": {}}'),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", f'<tool_call>{{"name": "{"f" * 300}", "arguments": {{}}}}</tool_call>'),
        ("gemma", "[1] A footnote"),
        ("gemma", "[x](https://example.org)"),
        ("gemma", '```json\n{"a": 1}\n```'),
        ("gemma", "```tool_code\nf('Paris')\n```"),
        ("gemma", "```tool_code\nf(a='\\ud800')\n```"),
        ("glm", "<tool_call>not a call</tool_call>"),
        ("qwen3-coder", "<tool_call><function=f>text</function></tool_call>"),
        ("mistral", "[TOOL_CALLS]f says hello"),
        ("qwen3-coder", "Write <function=other></function> then."),
        ("qwen3-coder", "<function=time> begins one."),
    ],
)
def test_text_that_is_no_call_is_content(name: str, text: str) -> None:
    assert read(form(name), text) == [Content(text)]
    assert read(form(name), [text]) == [Content(text)]


def test_arguments_nested_beyond_reason_are_no_arguments() -> None:
    parts = read(form("hermes"), ['<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 10_000])
    assert parts[0] == ToolCall(0, "f")
    assert BrokenCall(0, False) in parts
    assert len(text_of(parts, Content)) > 9_000


def test_nothing_is_read_after_the_end() -> None:
    parser = form("hermes").parser(tools=True, in_reasoning=False)
    assert parser.push("a") == [Content("a")]
    assert parser.finish() == []
    assert parser.finish() == []


def test_content_is_released_as_soon_as_it_cannot_begin_a_marker() -> None:
    parser = form("hermes").parser(tools=True, in_reasoning=False)
    assert parser.push("Hi <tool") == [Content("Hi")]
    assert parser.push("_call") == []
    assert parser.push("!") == [Content(" <tool_call!")]


@pytest.mark.parametrize("name", [name for name in MARKED if FORMATS[name].special])
def test_a_control_token_that_ends_no_call_is_not_shown(name: str) -> None:
    for end in form(name).stray:
        for pieces in (text := f"Yes.{end}\n{ONE_CALL[name]}{end}", [text]):
            assert read(form(name), pieces) == [Content("Yes."), *THE_CALL]
        assert read(form(name), f"Yes.{end}", ()) == [Content(f"Yes.{end}")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cohere", "<|START_RESPONSE|>Yes.<|END_RESPONSE|>"),
        ("cohere", "<|START_THINKING|>Hm.<|END_THINKING|><|START_TEXT|>Yes.<|END_TEXT|>"),
        ("kimi-k3", "<|open|>response<|sep|>Yes.<|close|>response<|sep|><|close|>message<|sep|>"),
        ("gemma4", "<|channel>thought<channel|>Yes."),
        ("gemma4", "<channel|>Yes."),
        ("minimax-m3", "</mm:think>Yes."),
        ("gigachat3.1", "Yes.<|message_sep|>"),
        ("llama4", "Yes.<|python_end|>"),
        ("hunyuan", "<think>Hm.</think>\n<answer>\nYes.\n</answer>"),
        ("ernie", "<response>\nYes.\n</response>\n"),
        ("apriel", "Here are my reasoning steps:\nHm.\n[BEGIN FINAL RESPONSE]\nYes.\n[END FINAL RESPONSE]"),
    ],
)
def test_marks_around_content_are_not_shown(name: str, text: str) -> None:
    for tools in (TOOLS, ()):
        for pieces in (text, [text]):
            parts = read(FORMATS[name], pieces, tools)
            assert [part for part in parts if not isinstance(part, Reasoning)] == [Content("Yes.")]


def test_a_tag_inside_an_answer_is_text() -> None:
    text = "Write <response>x</response> here."
    for pieces in (whole := f"<response>{text}</response>\n", [whole]):
        assert read(FORMATS["ernie"], pieces) == [Content(text)]


def test_harmony_calls_a_function_that_is_named_without_its_namespace() -> None:
    text = ONE_CALL["harmony"].replace("functions.", "")
    assert read(form("harmony"), text) == THE_CALL
    parts = read(form("harmony"), text.replace("get_weather", "python"))
    assert parts == [Content('{"city": "Paris", "days": 3}')]


@pytest.mark.parametrize("name", [name for name in MARKED if FORMATS[name].stray and name != "kimi-k3"])
def test_what_cannot_be_read_as_a_call_is_shown_with_its_end(name: str) -> None:
    bad_value = ONE_CALL[name].replace("3", "}{x]<]minimax[>[<", 1)
    bad_name = ONE_CALL[name].replace("get_weather", "<>{}", 1)
    shown = 0
    for text in (f"So: {bad_value} Hm.", f"So: {bad_name} Hm."):
        for pieces in (text, [text]):
            parts = read(form(name), pieces)
            begun = sum(isinstance(part, ToolCall) for part in parts)
            if begun == sum(isinstance(part, BrokenCall) for part in parts):
                assert text_of(parts, Content) == text
                shown += 1
    assert shown
    text = f"{bad_name}{ONE_CALL[name]}"
    assert not any(
        text_of(read(form(name), text), Content).count(end) > bad_name.count(end) for end in form(name).stray
    )
