"""The formats that write calls as Python does, ``get_weather(city="Paris")``, and those of FunctionGemma and Gemma 4.

LFM2 writes a list of calls between markers (Liquid AI's documentation of tool use) or JSON, Olmo 3 a call on each line
between tags. Llama 3.2, Llama 4, ToolACE and others have templates that ask for a bare list. Gemma 3 has no format of
its own; ai.google.dev/gemma/docs asks it for ```` ```tool_code ```` with calls inside, a bare list, or
``{"name": …, "parameters": {…}}``. All are read, the first is written. FunctionGemma and Gemma 4 write
``call:name{key:<escape>text<escape>}`` between control tokens, Gemma 4 with ``<|"|>`` for ``<escape>``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from exo.chat.grammar.builder import GrammarBuilder
from exo.chat.grammar.tool_schema import LONGEST_NAME, Tool
from exo.chat.output.arguments import Field, fields
from exo.chat.output.format import OutputFormat
from exo.chat.output.json_call import json_call
from exo.chat.output.parser import ReplyState, Thinking
from exo.chat.output.python_literal import Notation, read_value
from exo.chat.output.scanner import Steps

_NAME = re.compile(r"[\w.-]*")
_MARKED_NAME = re.compile(r"[^\s{}<>]*")
_KEY = re.compile(r"[^\s=:,(){}\[\]<>\"']*")
_PYTHON = Notation(assign="=", close=")")
_CODE, _JSON, _FENCE = "```tool_code", "```json", "```"


def _loose_call(reply: ReplyState, name: str, notation: Notation) -> Steps[bool]:
    """Reads a call's arguments up to the closing character. The call begins with the first whole argument.

    Returns false if the arguments are invalid or cut off.
    """
    scanner = reply.scanner
    begun = False
    yield from scanner.space()
    end = yield from scanner.either(notation.close)
    while not end:
        yield from scanner.space()
        key = yield from scanner.run(_KEY, LONGEST_NAME)
        yield from scanner.space()
        if not key or not (yield from scanner.either(notation.assign)):
            return False
        value = yield from read_value(scanner, notation)
        if value is None or not (end := (yield from scanner.either(",", notation.close))):
            return False
        if not begun:
            yield reply.call(name)
            begun = True
        yield reply.argument(key, value)
        if end == ",":
            yield from scanner.space()
            end = yield from scanner.either(notation.close)
    if not begun:
        yield reply.call(name)
    yield reply.end_arguments()
    return True


def _read_python(reply: ReplyState, *, listed: bool) -> Steps[bool]:
    """Reads calls with white space or commas between them. If ``listed``, the opening bracket has been read."""
    scanner = reply.scanner
    while True:
        yield from scanner.space()
        name = yield from scanner.run(_NAME, LONGEST_NAME)
        if not name or not (yield from scanner.either("(")):
            return False
        if not (yield from _loose_call(reply, name, _PYTHON)):
            return False
        yield from scanner.space()
        if listed and (yield from scanner.either(",", "]")) != ",":
            return True  # a missing end is forgiven
        if not listed and not (yield from scanner.peek()).isidentifier():
            return True
        reply.next_call()


def _writable(name: str) -> str:
    """Returns the name. Raises ``ValueError`` if it needs quotes."""
    if not name or not _NAME.fullmatch(name):
        raise ValueError(f"this model's call format does not allow the name {name!r}")
    return name


@dataclass(frozen=True, slots=True)
class _PythonCalls:
    """Python calls between ``begin`` and ``end``, in a list or each on a line of its own."""

    begin: str
    end: str
    listed: bool

    def read(self, reply: ReplyState, marker: str) -> Steps[bool]:
        """Reads on after ``begin``. Without a marker, at the beginning of a reply, only a list counts."""
        scanner = reply.scanner
        yield from scanner.space()
        listed = bool((yield from scanner.either("[")))
        if not marker and not listed:
            return False
        yield from scanner.space()
        if marker and (yield from scanner.peek()) == "{":
            whole = yield from self._read_json(reply)
        else:
            whole = yield from _read_python(reply, listed=listed)
        yield from scanner.space()
        if whole and self.end:
            yield from scanner.either(self.end)
        return whole

    def _read_json(self, reply: ReplyState) -> Steps[bool]:
        scanner = reply.scanner
        while (yield from json_call(reply, marked=True)):
            yield from scanner.space()
            if (yield from scanner.either(",", "]")) != ",":
                return True
            reply.next_call(",")
            yield from scanner.space()
        return False

    def write(self, grammar: GrammarBuilder, tools: Sequence[Tool], parallel: bool) -> str:
        """Returns the expression of calls."""
        opening, between, closing = ("[", ", ", "]") if self.listed else ("\n", "\n", "\n")
        calls: list[str] = []
        for tool in tools:
            members = [(self._write_argument(grammar, field), field.required) for field in fields(tool)]
            name = grammar.plain(_writable(tool.name) + "(")
            calls.append(grammar.sequence(name, grammar.listed(members, ", "), grammar.plain(")")))
        several = grammar.several(grammar.one_of(calls), between, parallel)
        return grammar.sequence(grammar.marked(self.begin + opening), several, grammar.marked(closing + self.end))

    def _write_argument(self, grammar: GrammarBuilder, field: Field) -> str:
        return grammar.sequence(grammar.plain(_writable(field.name) + "="), grammar.json(field.schema))


def _read_gemma(reply: ReplyState, marker: str) -> Steps[bool]:
    scanner = reply.scanner
    yield from scanner.space()
    if not marker and (yield from scanner.either("[")):
        return (yield from _read_python(reply, listed=True))
    if marker != _CODE:
        whole = yield from json_call(reply, marked=False)
    else:
        printed = yield from scanner.either("print(")
        whole = yield from _read_python(reply, listed=bool((yield from scanner.either("["))))
        if whole and printed:
            yield from scanner.either(")")
    if whole and marker:
        yield from scanner.space()
        yield from scanner.either(_FENCE)
    return whole


@dataclass(frozen=True, slots=True)
class _GemmaCalls:
    """Calls between control tokens, in Gemma's notation."""

    begin: str
    end: str
    quote: str

    def read(self, reply: ReplyState, marker: str) -> Steps[bool]:
        """Reads on after ``begin``. Several calls may precede ``end``, perhaps with commas between them."""
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

    def _read_call(self, reply: ReplyState) -> Steps[bool]:
        scanner = reply.scanner
        if not (yield from scanner.either("call:")):
            return False
        name = yield from scanner.run(_MARKED_NAME, LONGEST_NAME)
        if not name or not (yield from scanner.either("{")):
            return False
        return (yield from _loose_call(reply, name, Notation(assign=":", close="}", quotes=(self.quote,))))

    def write(self, grammar: GrammarBuilder, tools: Sequence[Tool], parallel: bool) -> str:
        """Returns the expression of calls."""
        calls: list[str] = []
        for tool in tools:
            members = [(self._write_argument(grammar, field), field.required) for field in fields(tool)]
            name = grammar.plain(f"call:{tool.name}{{")
            calls.append(grammar.sequence(name, grammar.listed(members, ","), grammar.plain("}")))
        call = grammar.sequence(grammar.marked(self.begin), grammar.one_of(calls), grammar.marked(self.end))
        return grammar.several(call, "", parallel)

    def _write_argument(self, grammar: GrammarBuilder, field: Field) -> str:
        name = grammar.plain(_writable(field.name) + ":")
        if field.is_text or field.choices:
            return grammar.sequence(name, grammar.marked(self.quote), field.written(grammar, self.quote))
        return grammar.sequence(name, grammar.json(field.schema))


_BARE = _PythonCalls("", "", listed=True)
_LFM2 = _PythonCalls("<|tool_call_start|>", "<|tool_call_end|>", listed=True)
_OLMO3 = _PythonCalls("<function_calls>", "</function_calls>", listed=False)
_FUNCTION_GEMMA = _GemmaCalls("<start_function_call>", "<end_function_call>", "<escape>")
_GEMMA4 = _GemmaCalls("<|tool_call>", "<tool_call|>", '<|"|>')

FORMATS = (
    OutputFormat(
        "function-gemma",
        special=True,
        begin=(_FUNCTION_GEMMA.begin,),
        stray=(_FUNCTION_GEMMA.end, "<start_function_response>"),
        read_calls=_FUNCTION_GEMMA.read,
        write_calls=_FUNCTION_GEMMA.write,
    ),
    OutputFormat(
        "gemma",
        begin=(_CODE, _JSON),
        read_calls=_read_gemma,
        bare=True,
        closing_json=True,
        write_calls=_PythonCalls(_CODE, _FENCE, listed=False).write,
    ),
    OutputFormat(
        "gemma4",
        special=True,
        thinking=Thinking("<|channel>thought", "<channel|>"),
        frame=("<channel|>", "<|tool_response>"),
        begin=(_GEMMA4.begin,),
        stray=(_GEMMA4.end,),
        read_calls=_GEMMA4.read,
        write_calls=_GEMMA4.write,
    ),
    OutputFormat(
        "lfm2",
        special=True,
        begin=(_LFM2.begin,),
        stray=(_LFM2.end,),
        read_calls=_LFM2.read,
        write_calls=_LFM2.write,
    ),
    OutputFormat("olmo3", begin=(_OLMO3.begin,), read_calls=_OLMO3.read, write_calls=_OLMO3.write),
    OutputFormat(
        "pythonic",
        special=True,
        begin=("<|python_start|>",),
        frame=("<|python_end|>",),
        read_calls=_BARE.read,
        bare=True,
        write_calls=_BARE.write,
    ),
)
