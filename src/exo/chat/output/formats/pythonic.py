"""The formats that write Python calls: LFM2, Olmo 3, and models that are asked for a bare list of calls.

LFM2 writes ``<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>`` (Liquid AI's documentation of tool use),
Olmo 3 a call on each line between ``<function_calls>`` tags. Llama 3.2, Llama 4, ToolACE and others have templates that
ask for ``[get_weather(city="Paris")]`` and nothing else. LFM2 may also write JSON between its markers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from exo.chat.grammar.builder import Grammar
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.format import OutputFormat
from exo.chat.output.json_call import json_call
from exo.chat.output.parser import Reply
from exo.chat.output.python_calls import python_calls, write_python_calls
from exo.chat.output.scanner import Steps


@dataclass(frozen=True, slots=True)
class _PythonCalls:
    """Calls between ``begin`` and ``end``, in brackets or each on a line of its own."""

    begin: str
    end: str
    listed: bool

    def read(self, reply: Reply, marker: str) -> Steps[bool]:
        """Reads on behind ``begin``. At the very beginning of a reply ``marker`` is empty, and only a list counts."""
        scanner = reply.scanner
        yield from scanner.space()
        listed = bool((yield from scanner.either("[")))
        if not marker and not listed:
            return False
        yield from scanner.space()
        if marker and (yield from scanner.peek()) == "{":
            whole = yield from _json_calls(reply)
        else:
            whole = yield from python_calls(reply, listed=listed)
        yield from scanner.space()
        if whole and self.end:
            yield from scanner.either(self.end)
        return whole

    def write(self, grammar: Grammar, tools: Sequence[Tool], parallel: bool) -> str:
        """The expression of calls."""
        opening, between, closing = ("[", ", ", "]") if self.listed else ("\n", "\n", "\n")
        calls = write_python_calls(grammar, tools, parallel, between)
        return grammar.sequence(grammar.marked(self.begin + opening), calls, grammar.marked(closing + self.end))


def _json_calls(reply: Reply) -> Steps[bool]:
    scanner = reply.scanner
    while (yield from json_call(reply, marked=True)):
        yield from scanner.space()
        if (yield from scanner.either(",", "]")) != ",":
            return True
        reply.next_call(",")
        yield from scanner.space()
    return False


_LFM2 = _PythonCalls("<|tool_call_start|>", "<|tool_call_end|>", listed=True)
_OLMO3 = _PythonCalls("<function_calls>", "</function_calls>", listed=False)
_BARE = _PythonCalls("", "", listed=True)

LFM2 = OutputFormat(
    "lfm2", special=True, begin=(_LFM2.begin,), stray=(_LFM2.end,), read_call=_LFM2.read, write_calls=_LFM2.write
)
OLMO3 = OutputFormat("olmo3", begin=(_OLMO3.begin,), read_call=_OLMO3.read, write_calls=_OLMO3.write)
PYTHONIC = OutputFormat(
    "pythonic",
    special=True,
    begin=("<|python_start|>",),
    frame=("<|python_end|>",),
    read_call=_BARE.read,
    read_bare=_BARE.read,
    write_calls=_BARE.write,
)
