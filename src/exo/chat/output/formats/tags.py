"""The formats that write each argument between tags of its own.

Published in the models' chat templates and tool parsers: Qwen3-Coder's and Seed-OSS' ``<function=…><parameter=…>``,
``<arg_key>`` and ``<arg_value>`` of GLM 4.5 and Hunyuan 3, ``<invoke name="…"><parameter name="…">`` of MiniMax M2 and
of DeepSeek V3.2 and V4 (DSML), and ``<function name="…"><param name="…">`` of MiniCPM 5.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from exo.chat.grammar.builder import GrammarBuilder
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.arguments import Field, fields
from exo.chat.output.format import OutputFormat
from exo.chat.output.parser import Thinking
from exo.chat.output.tagged_call import NAME, Tags


def _write(tags: Tags, grammar: GrammarBuilder, tools: Sequence[Tool], parallel: bool) -> str:
    calls = [
        grammar.sequence(
            grammar.plain(tool.name),
            grammar.marked(tags.name_end + "\n"),
            *(_write_argument(tags, grammar, field) for field in fields(tool)),
        )
        for tool in tools
    ]
    if tags.grouped:
        call = grammar.sequence(grammar.marked(tags.call), grammar.one_of(calls), grammar.marked(tags.call_end + "\n"))
        several = grammar.several(call, "", parallel)
        return grammar.sequence(grammar.marked(tags.begin + "\n"), several, grammar.marked(tags.end))
    before = tags.begin + ("\n" if tags.call else "") + tags.call
    after = tags.call_end + ("\n" if tags.call_end else "") + tags.end
    call = grammar.sequence(grammar.marked(before), grammar.one_of(calls), grammar.marked(after))
    return grammar.several(call, "\n", parallel)


def _write_argument(tags: Tags, grammar: GrammarBuilder, field: Field) -> str:
    if not NAME.fullmatch(field.name):
        raise ValueError(f"this model's call format does not allow the argument name {field.name!r}")
    line = "\n" if tags.own_line else ""
    text = field.is_text or field.choices
    between = tags.text_key_end if text and tags.text_key_end else "\n".join(tags.key_end)
    member = grammar.sequence(
        grammar.marked(tags.key),
        grammar.plain(field.name),
        grammar.marked(between + line),
        field.written(grammar, tags.value_end, before_end=line),
        grammar.plain("\n"),
    )
    return member if field.required else f"{member}?"


def _format(name: str, tags: Tags, *, special: bool = False, thinking: Thinking | None = None) -> OutputFormat:
    return OutputFormat(
        name,
        special=special,
        thinking=thinking,
        begin=(tags.begin, tags.call) if tags.call else (tags.begin,),
        stray=(tags.end,) if special else (),
        read_calls=tags.read,
        write_calls=partial(_write, tags),
    )


_QWEN3_CODER = Tags(
    begin="<tool_call>",
    call="<function=",
    name_end=">",
    key="<parameter=",
    key_end=(">",),
    value_end="</parameter>",
    call_end="</function>",
    end="</tool_call>",
    own_line=True,
)
_SEED = replace(_QWEN3_CODER, begin="<seed:tool_call>", end="</seed:tool_call>", own_line=False)
_GLM = Tags(
    begin="<tool_call>",
    call="",
    name_end="",
    key="<arg_key>",
    key_end=("</arg_key>", "<arg_value>"),
    value_end="</arg_value>",
    call_end="",
    end="</tool_call>",
)
_HUNYUAN3 = Tags(
    begin="<tool_calls:opensource>",
    call="<tool_call:opensource>",
    name_end="<tool_sep:opensource>",
    key="<arg_key:opensource>",
    key_end=("</arg_key:opensource>", "<arg_value:opensource>"),
    value_end="</arg_value:opensource>",
    call_end="</tool_call:opensource>",
    end="</tool_calls:opensource>",
    grouped=True,
)
_MINIMAX = Tags(
    begin="<minimax:tool_call>",
    call='<invoke name="',
    name_end='">',
    key='<parameter name="',
    key_end=('">',),
    value_end="</parameter>",
    call_end="</invoke>",
    end="</minimax:tool_call>",
    grouped=True,
)
_MINICPM5 = Tags(
    begin='<function name="',
    call="",
    name_end='">',
    key='<param name="',
    key_end=('">',),
    value_end="</param>",
    call_end="",
    end="</function>",
    cdata=True,
)
_DSML = "\uff5cDSML\uff5c"
_DEEPSEEK_V4 = Tags(
    begin=f"<{_DSML}tool_calls>",
    call=f'<{_DSML}invoke name="',
    name_end='">',
    key=f'<{_DSML}parameter name="',
    key_end=('" string="false">',),
    text_key_end='" string="true">',
    value_end=f"</{_DSML}parameter>",
    call_end=f"</{_DSML}invoke>",
    end=f"</{_DSML}tool_calls>",
    grouped=True,
)
_DEEPSEEK_V32 = replace(_DEEPSEEK_V4, begin=f"<{_DSML}function_calls>", end=f"</{_DSML}function_calls>")

FORMATS = (
    _format("deepseek-v3.2", _DEEPSEEK_V32, special=True),
    _format("deepseek-v4", _DEEPSEEK_V4, special=True),
    _format("glm", _GLM),
    _format("hunyuan3", _HUNYUAN3, special=True, thinking=Thinking("<think:opensource>", "</think:opensource>")),
    _format("minicpm5", _MINICPM5),
    _format("minimax", _MINIMAX),
    _format("qwen3-coder", _QWEN3_CODER),
    _format("seed", _SEED, special=True, thinking=Thinking("<seed:think>", "</seed:think>")),
)
