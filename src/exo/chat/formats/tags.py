"""The formats that write each argument between tags of its own.

Published in the models' chat templates and tool parsers: Qwen3-Coder's and Seed-OSS' ``<function=…><parameter=…>``,
``<arg_key>`` and ``<arg_value>`` of GLM 4.5 and Hunyuan 3, ``<invoke name="…"><parameter name="…">`` of MiniMax M2 and
of DeepSeek V3.2 and V4 (DSML), and ``<function name="…"><param name="…">`` of MiniCPM 5.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from exo.chat.fields import Field, fields, to_json, typed_to_json, written_as_json
from exo.chat.format import OutputFormat
from exo.chat.json_call import LONGEST_NAME
from exo.chat.lark import Grammar
from exo.chat.reply import Reply, Thinking
from exo.chat.scanner import Scanner, Steps, markers
from exo.chat.tools import Tool

_NAME = re.compile(r"[^<>\"\s]*")


_QUOTE = re.compile(r'\\.|(")', re.DOTALL)
_CDATA, _CDATA_END = "<![CDATA[", "]]>"
_JSON_BEGINS = ('"', "[", "{")


def _quotes(text: str) -> int:
    """Quotation marks that begin or end a string."""
    return sum(match[1] is not None for match in _QUOTE.finditer(text))


@dataclass(frozen=True, slots=True)
class _Tags:
    """The texts around the parts of a call. White space between them means nothing."""

    begin: str
    call: str
    """Before the name; empty where nothing but ``begin`` is."""
    named: str
    key: str
    keyed: tuple[str, ...]
    value_end: str
    call_end: str
    """Empty where nothing but ``end`` is."""
    end: str
    own_line: bool
    """Whether a line break before and after each value is not part of it."""
    text_keyed: str = ""
    """The same as ``keyed`` for a text, where the model tells texts and JSON apart; ``keyed`` is then for JSON."""
    grouped: bool = False
    """Whether several calls are written between one ``begin`` and ``end``."""
    cdata: bool = False
    """Whether a value may be in a CDATA section."""

    def read(self, reply: Reply, marker: str) -> Steps[bool]:
        """Reads on behind ``begin``, or behind ``call`` where the model left ``begin`` out."""
        if not self.call:
            yield from reply.scanner.space()
            return (yield from self._call(reply, known=False))
        bare = marker == self.call
        return (yield from reply.several(self.call, self.end, lambda: self._call(reply, known=bare), begun=bare))

    def write(self, grammar: Grammar, tools: Sequence[Tool], parallel: bool) -> str:
        """The expression of calls."""
        calls = [self._write_call(grammar, tool) for tool in tools]
        if self.grouped:
            call = grammar.sequence(
                grammar.marked(self.call), grammar.one_of(calls), grammar.marked(self.call_end + "\n")
            )
            several = grammar.several(call, "", parallel)
            return grammar.sequence(grammar.marked(self.begin + "\n"), several, grammar.marked(self.end))
        before = self.begin + ("\n" if self.call else "") + self.call
        after = self.call_end + ("\n" if self.call_end else "") + self.end
        call = grammar.sequence(grammar.marked(before), grammar.one_of(calls), grammar.marked(after))
        return grammar.several(call, "\n", parallel)

    def _call(self, reply: Reply, *, known: bool) -> Steps[bool]:
        """Reads one call from its name on, which must be that of a tool if it is to be ``known``."""
        scanner = reply.scanner
        name = yield from scanner.run(_NAME, LONGEST_NAME)
        if (
            not name
            or (known and not reply.knows(name))
            or (self.named and not (yield from scanner.either(self.named)))
        ):
            return False
        done = self.call_end or self.end
        yield from scanner.space()
        follows = yield from scanner.either(self.key, done)
        if not follows:
            return False
        yield reply.call(name)
        before = "{"
        while follows == self.key:
            key, is_text = yield from self._key(scanner)
            schema = reply.schema(name)
            as_json = written_as_json(schema, key) if is_text is None else not is_text
            text = (yield from self._value(scanner, as_json=as_json)) if key else None
            if text is None:
                return False
            value = to_json(text, schema, key) if is_text is None else typed_to_json(text, is_text, schema, key)
            yield reply.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: {value}")
            before = ", "
            yield from scanner.space()
            follows = yield from scanner.either(self.key, done)
        if not follows:
            return False
        yield reply.arguments("{}" if before == "{" else "}")
        return True

    def _key(self, scanner: Scanner) -> Steps[tuple[str, bool | None]]:
        """Reads an argument's name, empty where there is none, and whether its value is text, where that is told."""
        key = yield from scanner.run(_NAME, LONGEST_NAME)
        is_text: bool | None = None
        for text in self.keyed:
            yield from scanner.space()
            found = yield from scanner.either(*filter(None, (self.text_keyed, text)))
            if not found:
                return "", None
            is_text = found == self.text_keyed if self.text_keyed else None
        return key, is_text

    def _value(self, scanner: Scanner, *, as_json: bool) -> Steps[str | None]:
        """Reads a value and its end, which does not count inside a string of JSON. None where the reply is cut off."""
        whole: list[str] = []
        in_string = False
        while True:
            pieces: list[str] = []
            if not (yield from scanner.until(markers(self.value_end), pieces.append)):
                return None
            piece = "".join(pieces)
            as_json = as_json and (bool(whole) or piece.lstrip()[:1] in _JSON_BEGINS)
            whole.append(piece)
            in_string ^= as_json and _quotes(piece) % 2 == 1
            if not in_string:
                value = "".join(whole)
                if self.cdata and value.startswith(_CDATA):
                    if value.endswith(_CDATA_END):
                        return value.removeprefix(_CDATA).removesuffix(_CDATA_END)
                else:
                    return value.removeprefix("\n").removesuffix("\n") if self.own_line else value
            whole.append(self.value_end)

    def _write_call(self, grammar: Grammar, tool: Tool) -> str:
        members = [self._write_argument(grammar, field) for field in fields(tool)]
        name = grammar.sequence(grammar.plain(tool.name), grammar.marked(self.named + "\n"))
        return grammar.sequence(name, *members)

    def _write_argument(self, grammar: Grammar, field: Field) -> str:
        if not _NAME.fullmatch(field.name):
            raise ValueError(f"in this model's call format, no argument can be called {field.name!r}")
        line = "\n" if self.own_line else ""
        text = field.is_text or field.choices
        between = self.text_keyed if text and self.text_keyed else "\n".join(self.keyed)
        member = grammar.sequence(
            grammar.marked(self.key),
            grammar.plain(field.name),
            grammar.marked(between + line),
            self._write_value(grammar, field, line),
            grammar.plain("\n"),
        )
        return member if field.required else f"{member}?"

    def _write_value(self, grammar: Grammar, field: Field, line: str) -> str:
        if field.is_text:
            return grammar.text_until(self.value_end)
        if field.choices:
            value = grammar.one_of([json.dumps(choice) for choice in field.choices])
        else:
            value = grammar.json(field.schema)
        return grammar.sequence(value, grammar.marked(line + self.value_end))


_QWEN3_CODER = _Tags(
    begin="<tool_call>",
    call="<function=",
    named=">",
    key="<parameter=",
    keyed=(">",),
    value_end="</parameter>",
    call_end="</function>",
    end="</tool_call>",
    own_line=True,
)
_GLM = _Tags(
    begin="<tool_call>",
    call="",
    named="",
    key="<arg_key>",
    keyed=("</arg_key>", "<arg_value>"),
    value_end="</arg_value>",
    call_end="",
    end="</tool_call>",
    own_line=False,
)
_MINIMAX = _Tags(
    begin="<minimax:tool_call>",
    call='<invoke name="',
    named='">',
    key='<parameter name="',
    keyed=('">',),
    value_end="</parameter>",
    call_end="</invoke>",
    end="</minimax:tool_call>",
    own_line=False,
    grouped=True,
)
_SEED = replace(_QWEN3_CODER, begin="<seed:tool_call>", end="</seed:tool_call>", own_line=False)
_HUNYUAN3 = _Tags(
    begin="<tool_calls:opensource>",
    call="<tool_call:opensource>",
    named="<tool_sep:opensource>",
    key="<arg_key:opensource>",
    keyed=("</arg_key:opensource>", "<arg_value:opensource>"),
    value_end="</arg_value:opensource>",
    call_end="</tool_call:opensource>",
    end="</tool_calls:opensource>",
    own_line=False,
    grouped=True,
)
_MINICPM5 = _Tags(
    begin='<function name="',
    call="",
    named='">',
    key='<param name="',
    keyed=('">',),
    value_end="</param>",
    call_end="",
    end="</function>",
    own_line=False,
    cdata=True,
)
_DSML = "\uff5cDSML\uff5c"
_DEEPSEEK_V4 = _Tags(
    begin=f"<{_DSML}tool_calls>",
    call=f'<{_DSML}invoke name="',
    named='">',
    key=f'<{_DSML}parameter name="',
    keyed=('" string="false">',),
    value_end=f"</{_DSML}parameter>",
    call_end=f"</{_DSML}invoke>",
    end=f"</{_DSML}tool_calls>",
    own_line=False,
    text_keyed='" string="true">',
    grouped=True,
)
_DEEPSEEK_V32 = replace(_DEEPSEEK_V4, begin=f"<{_DSML}function_calls>", end=f"</{_DSML}function_calls>")


def _format(name: str, tags: _Tags, *, special: bool = False, thinking: Thinking | None = None) -> OutputFormat:
    return OutputFormat(
        name,
        special=special,
        thinking=thinking,
        begin=(tags.begin, tags.call) if tags.call else (tags.begin,),
        stray=(tags.end,) if special else (),
        read_call=tags.read,
        write_calls=tags.write,
    )


DEEPSEEK_V32 = _format("deepseek-v3.2", _DEEPSEEK_V32, special=True)
DEEPSEEK_V4 = _format("deepseek-v4", _DEEPSEEK_V4, special=True)
HUNYUAN3 = _format("hunyuan3", _HUNYUAN3, special=True, thinking=Thinking("<think:opensource>", "</think:opensource>"))
MINICPM5 = _format("minicpm5", _MINICPM5)
SEED = _format("seed", _SEED, special=True, thinking=Thinking("<seed:think>", "</seed:think>"))
QWEN3_CODER = _format("qwen3-coder", _QWEN3_CODER)
GLM = _format("glm", _GLM)
MINIMAX = _format("minimax", _MINIMAX)
