"""Conversations with tools on their way through a chat template, and what else a template is told."""

import json
from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack

import pytest
from pydantic import JsonValue

from exo.cards.card import ModelCard
from exo.chat.output.events import Arguments, ToolCall
from exo.chat.output.registry import output_format
from exo.chat.template.renderer import (
    ConversationRefusedError,
    TemplateError,
    ToolsUnsupportedError,
    VariableRefusedError,
    chat_prompt,
)
from exo.worker.protocol.commands import Text
from tests import ROOT
from tests.support.rendering import CHATML, joined, model, user, worker


class Options(TypedDict, total=False):
    tools: Sequence[Mapping[str, JsonValue]]
    variables: Mapping[str, JsonValue]
    continue_final_message: bool


# --- tools, calls and their results ---

HERMES = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.name or '' }}:{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %};{% endfor %}"
)
TOOL: JsonValue = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}


def call(arguments: JsonValue, name: str = "f") -> Mapping[str, JsonValue]:
    function: dict[str, JsonValue] = {"name": name, "arguments": arguments}
    calls: list[JsonValue] = [{"id": "c1", "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(content: str) -> Mapping[str, JsonValue]:
    return {"role": "tool", "tool_call_id": "c1", "content": content}


async def rendered(template: str, *messages: Mapping[str, JsonValue], **options: Unpack[Options]) -> str:
    async with worker() as templates:
        return joined(await chat_prompt(templates, model(template), messages, **options))


async def test_tools_calls_and_results_reach_the_template() -> None:
    assert isinstance(TOOL, dict)
    text = await rendered(HERMES, user("Hi"), call('{"a": 1}'), result("7"), tools=[TOOL])
    assert text == (
        '{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}\n'
        'user::Hi;assistant::<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>;tool:f:7;'
    )


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("c.arguments | tojson", '{"a": [1, "é"]}'),
        ("c.arguments", '{"a": [1, "é"]}'),
        ("'>' + c['arguments'] + '<'", '>{"a": [1, "é"]}<'),
        ("'>' ~ c.arguments ~ '<'", '>{"a": [1, "é"]}<'),
        ("c.arguments if c.arguments is string else c.arguments | tojson", '{"a": [1, "é"]}'),
        ("c.arguments is mapping", "True"),
        ("c.arguments | items | list | length", "1"),
        ("c.arguments.a | join('/')", "1/é"),
    ],
)
async def test_arguments_serve_templates_that_want_an_object_and_those_that_want_text(
    expression: str, expected: str
) -> None:
    template = "{% set c = messages[0].tool_calls[0].function %}{{ " + expression + " }}"
    assert await rendered(template, call('{"a": [1, "é"]}')) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        (" ", {}),
        ("null", {}),
        (None, {}),
        ('{"a": 1}', {"a": 1}),
        ('{"a": "x\ny"}', {"a": "x\ny"}),
        ({"a": 1}, {"a": 1}),
        ("{", {}),
        ('{"a', {"a": None}),
        ('{"a"', {"a": None}),
        ('{"a":', {"a": None}),
        ('{"a": "x', {"a": "x"}),
        ('{"a": "x\\', {"a": "x"}),
        ('{"a": "x\\u00', {"a": "x"}),
        ('{"a": "x\\\\', {"a": "x\\"}),
        ('{"a": "}', {"a": "}"}),
        ('{"a": [1, {"b": 2},', {"a": [1, {"b": 2}]}),
        ('{"a": tru', {"arguments": '{"a": tru'}),
        ('{"a": NaN', {"arguments": '{"a": NaN'}),
        ("x", {"arguments": "x"}),
        ("[1]", {"arguments": "[1]"}),
        ([1], {"arguments": [1]}),
        ('{"a": 1} {', {"arguments": '{"a": 1} {'}),
        ('{"a": 1]', {"arguments": '{"a": 1]'}),
        ('{"a":' * 500 + "1" + "}" * 500, {"arguments": '{"a":' * 500 + "1" + "}" * 500}),
        ('{"a":' * 500, {"arguments": '{"a":' * 500}),
    ],
)
async def test_arguments_are_an_object_to_the_template(arguments: JsonValue, expected: JsonValue) -> None:
    text = await rendered("{{ messages[0].tool_calls[0].function.arguments | tojson }}", call(arguments))
    assert json.loads(text) == expected


async def test_tools_that_a_template_would_leave_out_are_refused() -> None:
    assert isinstance(TOOL, dict)
    with pytest.raises(ToolsUnsupportedError, match="no place for tools"):
        await rendered(CHATML, user("Hi"), tools=[TOOL])


async def test_a_template_that_reads_functions_gets_them_without_their_wrapping() -> None:
    assert isinstance(TOOL, dict)
    template = "{% for tool in tools %}{{ tool.name + ':' + tool.description }}{% endfor %}"
    assert await rendered(template, user("Hi"), tools=[TOOL]) == "f:"


@pytest.mark.parametrize("ensure_ascii", ["", "ensure_ascii=true"])
async def test_special_tokens_in_tools_calls_and_results_are_literal(ensure_ascii: str) -> None:
    mark = "<|im_end|>"
    inner: dict[str, JsonValue] = {mark: {"enum": [mark, [mark]]}}
    tool: dict[str, JsonValue] = {"type": "function", "function": {"name": mark, "parameters": {"properties": inner}}}
    messages = (user("x"), call('{"<|im_end|>": ["<|im_end|>"]}', name=mark), result(mark))
    template = HERMES.replace("tojson", f"tojson({ensure_ascii})")
    async with worker() as templates:
        made = await chat_prompt(templates, model(template), messages, tools=[tool])
    assert sum(stretch.text == mark and not stretch.special for stretch in made) == joined(made).count(mark) == 9
    assert not any(mark in stretch.text for stretch in made if stretch.special)


# --- variables ---


async def test_a_variable_that_the_template_reads_is_given() -> None:
    template = "{{ 'on' if enable_thinking is defined and enable_thinking else 'off' }}{{ level | default('low') }}"
    assert await rendered(template, user("x")) == "offlow"
    assert await rendered(template, user("x"), variables={"enable_thinking": True, "level": "high"}) == "onhigh"


async def test_the_switch_for_thinking_has_two_names() -> None:
    assert await rendered("{{ thinking }}", user("x"), variables={"enable_thinking": False}) == "False"


@pytest.mark.parametrize(
    "name",
    ["enable_thinking", "messages", "tools", "bos_token", "add_generation_prompt", "namespace", "raise_exception"],
)
async def test_a_variable_that_has_no_effect_or_is_not_the_callers_is_refused_by_name(name: str) -> None:
    template = "{{ messages }}{{ tools }}{{ bos_token }}{{ add_generation_prompt }}{% set n = namespace(a=1) %}"
    with pytest.raises(VariableRefusedError, match=f"does not take '{name}'") as refused:
        await rendered(template, user("x"), variables={name: True})
    assert refused.value.name == name


async def test_special_tokens_in_variables_are_literal() -> None:
    async with worker() as templates:
        made = await chat_prompt(templates, model("{{ note[0] }}"), [user("x")], variables={"note": ["<|im_end|>"]})
    assert made == (Text(text="<|im_end|>"),)


async def test_reasoning_of_earlier_turns_goes_by_the_name_that_the_template_knows() -> None:
    said: Mapping[str, JsonValue] = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert await rendered("{{ messages[0].reasoning_content }}", said) == "Hm."
    assert await rendered("{{ messages[0].thinking }}", said) == "Hm."


# --- the end of the prompt ---


async def test_a_reply_may_go_on_with_the_last_message() -> None:
    messages = (user("Count"), {"role": "assistant", "content": "One, two, <|im_"})
    whole = await rendered(CHATML, *messages)
    assert "<|im_start|>assistant\nOne, two, <|im_<|im_end|>\n" in whole
    assert (await rendered(CHATML, *messages, continue_final_message=True)).endswith("assistant\nOne, two, <|im_")


async def test_only_text_of_the_assistants_can_be_continued() -> None:
    for last in (user("Hi"), call("{}")):
        with pytest.raises(ConversationRefusedError, match="can be continued"):
            await rendered(CHATML, last, continue_final_message=True)
    with pytest.raises(TemplateError, match="leaves out the message"):
        await rendered("x", {"role": "assistant", "content": "One"}, continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content ~ '|' }}", "|"),
        ("{% if messages[0]['content'] is none %}none{% endif %}", "none"),
        ("{% if messages[0].content is not none %}some{% else %}none{% endif %}", "none"),
    ],
)
async def test_a_call_without_content_is_shown_as_the_template_expects(template: str, expected: str) -> None:
    assert await rendered(template, call("{}")) == expected


async def test_ids_of_calls_are_names_where_the_template_writes_them_for_names() -> None:
    each = "{% for c in m.tool_calls or [] %}{{ c.id }} {% endfor %}{{ m.tool_call_id }} "
    template = "{% for m in messages %}" + each + "{% endfor %}"
    assert await rendered(template, call("{}"), result("7")) == "c1  c1 "
    kimi = template + "{# <|tool_calls_section_begin|> #}"
    assert await rendered(kimi, call("{}"), result("7")) == "functions.f:0  functions.f:0 "


async def test_the_demo_cards_template_writes_tools_as_hermes_does() -> None:
    assert isinstance(TOOL, dict)
    card = (ROOT / "src/exo/cards/built_in/gemma-3-270m.toml").read_text()
    template = ModelCard.from_toml(card).engines["cuda"]["chat_template"]
    assert isinstance(template, str)
    text = await rendered(template, user("Hi"), call('{"a": "<|im_end|>"}'), result("7"), tools=[TOOL])
    definition = '{"name": "f", "description": "", "parameters": {"type": "object"}}'
    assert f"<tools>\n{definition}\n</tools>" in text
    assert text.endswith("Tool: <tool_response>\n7\n</tool_response>\n\nAssistant:")
    written = text[text.index("Assistant: ") + len("Assistant: ") : text.index("Tool: ")]
    parser = output_format(template).parser(tools=True, in_reasoning=False)
    assert parser.push(written) == [ToolCall(0, "f"), Arguments(0, '{"a": "<|im_end|>"}')]


# --- what changes with every request ---

BILLING = "x-anthropic-billing-header: cc_version=2.1.332.e{}; cc_entrypoint=cli; cch={};"


@pytest.mark.parametrize("role", ["system", "developer"])
async def test_claude_codes_billing_line_is_left_out(role: str) -> None:
    for number in (1, 22):
        line = BILLING.format(number, number)
        text = await rendered(CHATML, {"role": role, "content": f"{line}\nYou are Claude Code."}, user("Hi"))
        assert text == await rendered(CHATML, {"role": role, "content": "You are Claude Code."}, user("Hi"))
        assert await rendered(CHATML, {"role": role, "content": line}, user("Hi")) == await rendered(CHATML, user("Hi"))


async def test_a_billing_line_that_is_talked_about_stays() -> None:
    line = BILLING.format(1, 1)
    for message in (user(line), {"role": "system", "content": f"Explain this:\n{line}"}):
        assert line in await rendered(CHATML, message)
