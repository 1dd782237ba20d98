"""The formats that write calls as JSON between two markers, most of them as an array of objects.

Each is published in the chat templates of its models. They differ in the markers and in the keys of an object only:
``{"name": …, "arguments": {…}}``, Cohere's ``{"tool_call_id": …, "tool_name": …, "parameters": {…}}`` and Apertus'
``{"get_weather": {…}}``. Functionary 3.1 has the name in the marker, as Llama 3.1 does where it is asked for that.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from exo.chat.grammar.builder import Grammar
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.format import OutputFormat
from exo.chat.output.json_call import LONGEST_NAME, json_call, json_string, write_json_call
from exo.chat.output.parser import Reply, Thinking
from exo.chat.output.scanner import Steps

_NAME = re.compile(r"[^<>{}\s\"]*")


def _read_named(reply: Reply, marked: bool) -> Steps[bool]:
    return (yield from json_call(reply, marked=marked))


@dataclass(frozen=True, slots=True)
class _JsonCalls:
    """Calls between ``begin`` and ``end``. An array and single objects are read; ``array`` says which is written."""

    begin: str
    end: str = ""
    """Empty where nothing follows the calls."""
    array: bool = True
    lead: str = ""
    """White space that is written before each object."""
    tail: str = ""
    """White space that is written after the last object."""
    single: bool = False
    """Whether only one call is written, however many are allowed: what ends it ends the reply."""
    read_object: Callable[[Reply, bool], Steps[bool]] = _read_named
    """Reads one object. The flag tells whether ``begin`` came before it."""
    write_object: Callable[[Grammar, Sequence[Tool]], str] = write_json_call

    def read(self, reply: Reply, marker: str) -> Steps[bool]:
        """Reads on behind ``begin``. At the very beginning of a reply ``marker`` is empty, and only an array counts."""
        scanner = reply.scanner
        yield from scanner.space()
        listed = yield from scanner.either("[")
        if not marker and not listed:
            return False
        while True:
            yield from scanner.space()
            if not (yield from self.read_object(reply, bool(marker))):
                return False
            yield from scanner.space()
            comma = yield from scanner.either(",")
            yield from scanner.space()
            if (yield from scanner.peek()) != "{":
                break
            reply.next_call(comma)
        if listed:
            yield from scanner.either("]")
            yield from scanner.space()
        if self.end:
            yield from scanner.either(self.end)
        return True

    def write(self, grammar: Grammar, tools: Sequence[Tool], parallel: bool) -> str:
        """The expression of calls."""
        opening, between, closing = ("[", f",{self.lead or ' '}", "]") if self.array else ("", self.lead, "")
        return grammar.sequence(
            grammar.marked(self.begin + opening + self.lead),
            grammar.several(self.write_object(grammar, tools), between, parallel and not self.single),
            grammar.marked(self.tail + closing + self.end),
        )


def _read_keyed(reply: Reply, marked: bool) -> Steps[bool]:
    """Reads ``{"get_weather": {…}}``."""
    scanner = reply.scanner
    if not (yield from scanner.either("{")):
        return False
    yield from scanner.space()
    name = yield from json_string(scanner)
    yield from scanner.space()
    if not name or not (yield from scanner.either(":")):
        return False
    yield from scanner.space()
    if (yield from scanner.peek()) != "{":
        return False
    yield reply.call(name)
    if not (yield from reply.json_arguments()):
        return False
    yield from scanner.space()
    yield from scanner.either("}")
    return True


def _write_keyed(grammar: Grammar, tools: Sequence[Tool]) -> str:
    return grammar.one_of(
        [
            grammar.sequence(
                grammar.plain(f"{{{json.dumps(tool.name)}: "), grammar.json(tool.schema), grammar.plain("}")
            )
            for tool in tools
        ]
    )


def _read_function(reply: Reply, marked: bool) -> Steps[bool]:
    """Reads ``get_weather>{…}``."""
    scanner = reply.scanner
    name = yield from scanner.run(_NAME, LONGEST_NAME)
    if not name or not (yield from scanner.either(">")):
        return False
    yield from scanner.space()
    if (yield from scanner.peek()) != "{":
        return False
    yield reply.call(name)
    return (yield from reply.json_arguments())


def _write_function(grammar: Grammar, tools: Sequence[Tool]) -> str:
    return grammar.one_of(
        [grammar.sequence(grammar.plain(f"{tool.name}>"), grammar.json(tool.schema)) for tool in tools]
    )


def _write_cohere(grammar: Grammar, tools: Sequence[Tool], *, lines: bool = False) -> str:
    """``{"tool_name": …, "parameters": {…}}``, either on ``lines`` or with the call's number in front."""
    gap, after = ("\n    ", "\n") if lines else (" ", "")
    calls = [
        grammar.sequence(
            grammar.plain(f'"tool_name": {json.dumps(tool.name)},{gap}"parameters": '), grammar.json(tool.schema)
        )
        for tool in tools
    ]
    if lines:
        before = grammar.plain("{" + gap)
    else:
        before = grammar.sequence(grammar.plain('{"tool_call_id": "'), "/[0-9]{1,3}/", grammar.plain('", '))
    return grammar.sequence(before, grammar.one_of(calls), grammar.plain(after + "}"))


_APERTUS = _JsonCalls("<|tools_prefix|>", "<|tools_suffix|>", read_object=_read_keyed, write_object=_write_keyed)
_COHERE = _JsonCalls("<|START_ACTION|>", "<|END_ACTION|>", lead="\n    ", tail="\n", write_object=_write_cohere)
_COMMAND_R = _JsonCalls(
    "Action:\n```json\n", "```", lead="\n", tail="\n", write_object=partial(_write_cohere, lines=True)
)
_NEMOTRON = _JsonCalls("<TOOLCALL>", "</TOOLCALL>")
_FUNCTION = _JsonCalls(
    "<function=", "</function>", array=False, single=True, read_object=_read_function, write_object=_write_function
)
_TOOL_CALLS = _JsonCalls("<tool_calls>", "</tool_calls>")
_MINIMAX_M1 = _JsonCalls("<tool_calls>", "</tool_calls>", array=False, lead="\n", tail="\n")
_GRANITE3 = _JsonCalls("<|tool_call|>", "<|/tool_call|>")
_GIGACHAT3 = _JsonCalls("function call<|role_sep|>\n", array=False, single=True)
_GIGACHAT31 = _JsonCalls("<|function_call|>", array=False, single=True)
_LONGCAT = _JsonCalls("<longcat_tool_call>", "</longcat_tool_call>", array=False, lead="\n", tail="\n")
_XLAM = _JsonCalls("")


def _format(
    name: str,
    calls: _JsonCalls,
    *,
    special: bool = False,
    thinking: Thinking | None = None,
    opening: tuple[str, ...] = (),
    frame: tuple[str, ...] = (),
    known: bool = True,
) -> OutputFormat:
    return OutputFormat(
        name,
        special=special,
        thinking=thinking,
        opening=opening,
        frame=frame,
        begin=(calls.begin.rstrip(),) if calls.begin else (),
        stray=(calls.end,) if special and calls.end else (),
        read_call=calls.read,
        read_bare=None if calls.begin else calls.read,
        write_calls=calls.write,
        known=known,
    )


APERTUS = _format("apertus", _APERTUS, special=True, thinking=Thinking("<|inner_prefix|>", "<|inner_suffix|>"))
COHERE = _format(
    "cohere",
    _COHERE,
    special=True,
    thinking=Thinking("<|START_THINKING|>", "<|END_THINKING|>"),
    opening=("<|START_RESPONSE|>", "<|START_TEXT|>"),
    frame=("<|END_RESPONSE|>", "<|END_TEXT|>"),
)
COMMAND_R = _format("command-r", _COMMAND_R)
FUNCTION = _format("function", _FUNCTION)
GIGACHAT3 = _format("gigachat3", _GIGACHAT3, special=True, frame=("<|message_sep|>",))
GIGACHAT31 = _format("gigachat3.1", _GIGACHAT31, special=True, frame=("<|message_sep|>",))
GRANITE3 = _format("granite3", _GRANITE3, special=True, opening=("<response>",), frame=("</response>",))
HUNYUAN = _format(
    "hunyuan",
    _TOOL_CALLS,
    thinking=Thinking("<think>", "</think>"),
    opening=("<answer>",),
    frame=("</answer>",),
)
LONGCAT = _format("longcat", _LONGCAT, thinking=Thinking("<longcat_think>", "</longcat_think>"))
MINIMAX_M1 = _format("minimax-m1", _MINIMAX_M1)
NEMOTRON = _format("nemotron", _NEMOTRON)
TOOL_CALLS = _format("tool-calls", _TOOL_CALLS)
APRIEL = replace(
    TOOL_CALLS,
    name="apriel",
    thinking=Thinking("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    frame=("[END FINAL RESPONSE]",),
)
XLAM = _format("xlam", _XLAM)
UNKNOWN = _format("unknown", _XLAM, known=False)
"""Plain JSON, which belongs to no family, for a call that a grammar forces."""
