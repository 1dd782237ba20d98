"""Replies in the formats of published models, and helpers to parse them, for the tests of ``exo.chat``."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.chat.output.parser import Thinking
from exo.chat.output.registry import FORMATS, OutputFormat

BAR = "\uff5c"
WEATHER = Tool(
    "get_weather",
    "The weather of a city",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
        "required": ["city"],
    },
)
TIME = Tool("time", "The time", {"type": "object", "properties": {}})
TOOLS = (WEATHER, TIME)


def dsml(block: str) -> str:
    """One call as DeepSeek V3.2 and later write it."""
    tag = f"{BAR}DSML{BAR}"
    return (
        f'<{tag}{block}>\n<{tag}invoke name="get_weather">\n<{tag}parameter name="city" string="true">'
        f"Paris</{tag}parameter>\n"
        f'<{tag}parameter name="days" string="false">3</{tag}parameter>\n</{tag}invoke>\n</{tag}{block}>'
    )


ONE_CALL = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
    "qwen3-coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>",
    "llama3": '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}',
    "mistral": '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 3}',
    "mistral-array": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]',
    "gemma": "```tool_code\nget_weather(city='Paris', days=3)\n```",
    "function-gemma": "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>",
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>',
    "deepseek-v3": f"<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>function<{BAR}tool▁sep{BAR}>get_weather\n"
    f'```json\n{{"city": "Paris", "days": 3}}\n```<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}>',
    "deepseek-v3.1": f"<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>get_weather<{BAR}tool▁sep{BAR}>"
    f'{{"city": "Paris", "days": 3}}<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}>',
    "glm": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>",
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Paris", "days": 3}<|tool_call_end|><|tool_calls_section_end|>',
    "minimax": '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
    '<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>',
    "harmony": "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city": "Paris", "days": 3}<|call|>',
    "apertus": '<|tools_prefix|>[{"get_weather": {"city": "Paris", "days": 3}}]<|tools_suffix|>',
    "apriel": '<tool_calls>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]</tool_calls>',
    "cohere": '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
    '{"city": "Paris", "days": 3}}\n]<|END_ACTION|>',
    "command-r": 'Action:\n```json\n[\n{\n    "tool_name": "get_weather",\n    "parameters": '
    '{"city": "Paris", "days": 3}\n}\n]```',
    "deepseek-v3.2": dsml("function_calls"),
    "deepseek-v4": dsml("tool_calls"),
    "ernie": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
    "function": '<function=get_weather>{"city": "Paris", "days": 3}</function>',
    "gigachat3": 'function call<|role_sep|>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}',
    "gigachat3.1": '<|function_call|>{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}',
    "granite3": '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]<|/tool_call|>',
    "hunyuan": '<tool_calls>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]</tool_calls>',
    "hunyuan3": "<tool_calls:opensource>\n<tool_call:opensource>get_weather<tool_sep:opensource>\n"
    "<arg_key:opensource>city</arg_key:opensource>\n<arg_value:opensource>Paris</arg_value:opensource>\n<arg_key:opensource>days"
    "</arg_key:opensource>\n<arg_value:opensource>3</arg_value:opensource>\n</tool_call:opensource>\n"
    "</tool_calls:opensource>",
    "kimi-k3": '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" '
    'type="string"<|sep|>Paris<|close|>argument<|sep|><|open|>argument key="days" type="number"<|sep|>3'
    "<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>",
    "lfm2": "<|tool_call_start|>[get_weather(city='Paris', days=3)]<|tool_call_end|>",
    "llama4": '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}',
    "longcat": '<longcat_tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n'
    "</longcat_tool_call>",
    "minicpm5": '<function name="get_weather">\n<param name="city">Paris</param>\n<param name="days">3</param>'
    "\n</function>",
    "minimax-m1": '<tool_calls>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_calls>',
    "minimax-m3": ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="get_weather">]<]minimax[>[<city>Paris'
    "]<]minimax[>[</city>]<]minimax[>[<days>3]<]minimax[>[</days>]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>",
    "nemotron": '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]</TOOLCALL>',
    "olmo3": "<function_calls>\nget_weather(city='Paris', days=3)\n</function_calls>",
    "pythonic": "[get_weather(city='Paris', days=3)]",
    "seed": "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n<parameter=days>3"
    "</parameter>\n</function>\n</seed:tool_call>",
    "tool-calls": '<tool_calls>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]</tool_calls>',
    "xlam": '[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]',
}
"""One call of ``WEATHER`` in each format, as its model writes it."""
MARKED = sorted(set(ONE_CALL) - {"harmony", "llama3", "llama4", "pythonic", "xlam"})
"""The formats whose call begins with a marker of its own."""

THE_CALL = [ToolCall(0, "get_weather"), Arguments(0, '{"city": "Paris", "days": 3}')]
THINK = Thinking("<think>", "</think>")


def form(name: str) -> OutputFormat:
    """The format, with ``<think>`` if it has no marks of its own for reasoning."""
    return replace(FORMATS[name], thinking=FORMATS[name].thinking or THINK)


def fragments(name: str) -> list[str]:
    """The pieces of a reply in this format, for tests that combine them wrongly."""
    thinking = form(name).thinking
    assert thinking is not None
    pieces = re.findall(r"</?[^<>\s]+>?|```\w*|\[\w+\]|\w+|\s+|[^\w\s]", ONE_CALL[name])
    return [*dict.fromkeys(pieces), thinking.begin, thinking.end, "é", '"a": [1, {}]', "\\", "\x00", " ", "}", ";"]


def merged(parts: Iterable[Part]) -> list[Part]:
    """The parts, with neighbours of one kind joined."""
    made: list[Part] = []
    for _, run in groupby(
        parts, lambda part: (type(part), part.index if isinstance(part, ToolCall | Arguments | BrokenCall) else 0)
    ):
        pieces = list(run)
        if isinstance(first := pieces[0], ToolCall | BrokenCall):
            made += pieces
        else:
            texts = [part.text for part in pieces if not isinstance(part, ToolCall | BrokenCall)]
            made.append(replace(first, text="".join(texts)))
    return made


def read(
    by: OutputFormat,
    pieces: Iterable[str],
    tools: Sequence[Tool] | bool = TOOLS,
    *,
    in_reasoning: bool = False,
    cut_off: bool = False,
) -> list[Part]:
    """The parts of a reply that arrives in these pieces; ``cut_off`` if it was not ended by the model."""
    parser = by.parser(tools=tools, in_reasoning=in_reasoning)
    parts = [part for piece in pieces for part in parser.push(piece)]
    return merged([*parts, *parser.finish(cut_off=cut_off)])


def text_of(parts: Iterable[Part], kind: type[Content] | type[Reasoning]) -> str:
    """All text of one kind."""
    return "".join(part.text for part in parts if isinstance(part, kind))
