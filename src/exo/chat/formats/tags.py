"""The formats that write each argument between tags of its own: Qwen3-Coder, GLM 4.5 and later, MiniMax M2.

Published in the models' chat templates and tool parsers: Qwen3-Coder's ``<function=…><parameter=…>``, GLM's
``<arg_key>`` and ``<arg_value>``, MiniMax's ``<invoke name="…"><parameter name="…">`` (docs/tool_calling_guide.md).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from exo.chat.fields import Field, fields, to_json, written_as_json
from exo.chat.format import OutputFormat
from exo.chat.json_call import LONGEST_NAME
from exo.chat.lark import Grammar
from exo.chat.reply import Reply
from exo.chat.scanner import Scanner, Steps, markers
from exo.chat.tools import Tool

_NAME = re.compile(r"[^<>\"\s]*")


_QUOTE = re.compile(r'\\.|(")', re.DOTALL)
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
            key = yield from self._key(scanner)
            schema = reply.schema(name)
            text = (yield from self._value(scanner, as_json=written_as_json(schema, key))) if key else None
            if text is None:
                return False
            yield reply.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: {to_json(text, schema, key)}")
            before = ", "
            yield from scanner.space()
            follows = yield from scanner.either(self.key, done)
        if not follows:
            return False
        yield reply.arguments("{}" if before == "{" else "}")
        return True

    def _key(self, scanner: Scanner) -> Steps[str]:
        """Reads an argument's name; empty where there is none."""
        key = yield from scanner.run(_NAME, LONGEST_NAME)
        for text in self.keyed:
            yield from scanner.space()
            if not (yield from scanner.either(text)):
                return ""
        return key

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
        between = "\n".join(self.keyed)
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
)


def _format(name: str, tags: _Tags) -> OutputFormat:
    begin = (tags.begin, tags.call) if tags.call else (tags.begin,)
    return OutputFormat(name, begin=begin, read_call=tags.read, write_calls=tags.write)


QWEN3_CODER = _format("qwen3-coder", _QWEN3_CODER)
GLM = _format("glm", _GLM)
MINIMAX = _format("minimax", _MINIMAX)
