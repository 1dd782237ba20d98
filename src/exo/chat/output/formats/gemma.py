"""Gemma's formats: what Google's documentation asks Gemma 3 to write, and those of FunctionGemma and Gemma 4.

Gemma 3 has none of its own. Published at ai.google.dev/gemma/docs are ```` ```tool_code ```` with Python calls inside,
a bare list of such calls, and ``{"name": …, "parameters": {…}}``; all are read, the first is written. The others write
``call:name{key:<escape>text<escape>}`` between control tokens, Gemma 4 with ``<|"|>`` for ``<escape>``.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from exo.chat.grammar.builder import Grammar
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.call_fields import Field, fields
from exo.chat.output.format import OutputFormat
from exo.chat.output.json_call import LONGEST_NAME, closing_json_calls, json_call
from exo.chat.output.parser import Reply, Thinking
from exo.chat.output.python_calls import python_calls, writable, write_python_calls
from exo.chat.output.python_literal import Notation, loose_call
from exo.chat.output.scanner import Steps

_CODE, _JSON, _FENCE = "```tool_code", "```json", "```"


def _read_fenced(reply: Reply, marker: str) -> Steps[bool]:
    scanner = reply.scanner
    yield from scanner.space()
    if marker == _JSON:
        whole = yield from json_call(reply, marked=False)
    else:
        printed = yield from scanner.either("print(")
        whole = yield from python_calls(reply, listed=bool((yield from scanner.either("["))))
        if whole and printed:
            yield from scanner.either(")")
    if whole:
        yield from scanner.space()
        yield from scanner.either(_FENCE)
    return whole


def _read_bare(reply: Reply, marker: str) -> Steps[bool]:
    yield from reply.scanner.space()
    if (yield from reply.scanner.either("[")):
        return (yield from python_calls(reply, listed=True))
    return (yield from json_call(reply, marked=bool(marker)))


def _write_fenced(grammar: Grammar, tools: Sequence[Tool], parallel: bool) -> str:
    calls = write_python_calls(grammar, tools, parallel, "\n")
    return grammar.sequence(grammar.marked(_CODE + "\n"), calls, grammar.marked("\n" + _FENCE))


@dataclass(frozen=True, slots=True)
class _Marked:
    """Calls between markers, in Gemma's own notation."""

    begin: str
    end: str
    quote: str

    def read(self, reply: Reply, marker: str) -> Steps[bool]:
        """Reads on behind ``begin``. Several calls may come before ``end``, perhaps with commas between them."""
        scanner = reply.scanner
        yield from scanner.space()
        while (yield from self._read_call(reply)):
            yield from scanner.space()
            between = yield from scanner.either(",", self.end)
            if between == self.end:
                return True
            reply.next_call(between)
            yield from scanner.space()
        return False

    def _read_call(self, reply: Reply) -> Steps[bool]:
        scanner = reply.scanner
        if not (yield from scanner.either("call:")):
            return False
        name = yield from scanner.run(_MARKED_NAME, LONGEST_NAME)
        if not name or not (yield from scanner.either("{")):
            return False
        return (yield from loose_call(reply, name, Notation(assign=":", close="}", quotes=(self.quote,))))

    def write(self, grammar: Grammar, tools: Sequence[Tool], parallel: bool) -> str:
        """The expression of calls."""
        calls: list[str] = []
        for tool in tools:
            members = [(self._argument(grammar, field), field.required) for field in fields(tool)]
            calls.append(
                grammar.sequence(grammar.plain(f"call:{tool.name}{{"), grammar.listed(members, ","), grammar.plain("}"))
            )
        call = grammar.sequence(grammar.marked(self.begin), grammar.one_of(calls), grammar.marked(self.end))
        return grammar.several(call, "", parallel)

    def _argument(self, grammar: Grammar, field: Field) -> str:
        name = grammar.plain(writable(field.name) + ":")
        if field.is_text:
            return grammar.sequence(name, grammar.marked(self.quote), grammar.text_until(self.quote))
        if not field.choices:
            return grammar.sequence(name, grammar.json(field.schema))
        choice = grammar.one_of([json.dumps(choice) for choice in field.choices])
        return grammar.sequence(name, grammar.marked(self.quote), choice, grammar.marked(self.quote))


_MARKED_NAME = re.compile(r"[^\s{}<>]*")
_FUNCTION_GEMMA = _Marked("<start_function_call>", "<end_function_call>", "<escape>")
_GEMMA4 = _Marked("<|tool_call>", "<tool_call|>", '<|"|>')

GEMMA = OutputFormat(
    "gemma",
    begin=(_CODE, _JSON),
    read_call=_read_fenced,
    read_bare=_read_bare,
    closing_calls=closing_json_calls,
    write_calls=_write_fenced,
)
FUNCTION_GEMMA = OutputFormat(
    "function-gemma",
    special=True,
    begin=(_FUNCTION_GEMMA.begin,),
    stray=(_FUNCTION_GEMMA.end, "<start_function_response>"),
    read_call=_FUNCTION_GEMMA.read,
    write_calls=_FUNCTION_GEMMA.write,
)
GEMMA4 = OutputFormat(
    "gemma4",
    special=True,
    thinking=Thinking("<|channel>thought", "<channel|>"),
    frame=("<channel|>", "<|tool_response>"),
    begin=(_GEMMA4.begin,),
    stray=(_GEMMA4.end,),
    read_call=_GEMMA4.read,
    write_calls=_GEMMA4.write,
)
