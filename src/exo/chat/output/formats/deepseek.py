"""The formats of DeepSeek V3 and R1, and of V3.1.

Published in the chat templates of deepseek-ai's models: V3 and R1 write the word "function", a separator, the name and
the arguments in a fenced block of JSON; V3.1 writes name, separator, arguments.
"""

import re
from collections.abc import Sequence
from functools import partial

from exo.chat.grammar.builder import Grammar
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.format import OutputFormat
from exo.chat.output.json_call import LONGEST_NAME
from exo.chat.output.parser import Reply
from exo.chat.output.scanner import Steps

_BAR = "\uff5c"
_ALL_BEGIN, _ALL_END = f"<{_BAR}tool▁calls▁begin{_BAR}>", f"<{_BAR}tool▁calls▁end{_BAR}>"
_BEGIN, _END = f"<{_BAR}tool▁call▁begin{_BAR}>", f"<{_BAR}tool▁call▁end{_BAR}>"
_SEPARATOR = f"<{_BAR}tool▁sep{_BAR}>"
_FENCE_BEGIN, _FENCE_END = "```json", "```"
_KIND = "function"
_NAME = re.compile(r"[^\s<>{}\"`]*")


def _read(reply: Reply, marker: str) -> Steps[bool]:
    return (yield from reply.several(_BEGIN, _ALL_END, partial(_call, reply), begun=marker == _BEGIN))


def _call(reply: Reply) -> Steps[bool]:
    scanner = reply.scanner
    name = yield from scanner.run(_NAME, LONGEST_NAME)
    if not (yield from scanner.either(_SEPARATOR)):
        return False
    yield from scanner.space()
    if (yield from scanner.peek()) != "{" and name == _KIND:
        name = yield from scanner.run(_NAME, LONGEST_NAME)
        yield from scanner.space()
        yield from scanner.either(_FENCE_BEGIN)
        yield from scanner.space()
    if not name or (yield from scanner.peek()) != "{":
        return False
    yield reply.call(name)
    if not (yield from reply.json_arguments()):
        return False
    yield from scanner.space()
    yield from scanner.either(_FENCE_END)
    yield from scanner.space()
    yield from scanner.either(_END)
    return True


def _write(grammar: Grammar, tools: Sequence[Tool], parallel: bool, *, fenced: bool) -> str:
    before_name = _BEGIN + (_KIND + _SEPARATOR if fenced else "")
    before_arguments = f"\n{_FENCE_BEGIN}\n" if fenced else _SEPARATOR
    end = (f"\n{_FENCE_END}" if fenced else "") + _END
    calls = [
        grammar.sequence(grammar.plain(tool.name), grammar.marked(before_arguments), grammar.json(tool.schema))
        for tool in tools
    ]
    call = grammar.sequence(grammar.marked(before_name), grammar.one_of(calls), grammar.marked(end))
    several = grammar.several(call, "\n" if fenced else "", parallel)
    return grammar.sequence(grammar.marked(_ALL_BEGIN), several, grammar.marked(_ALL_END))


DEEPSEEK_V3 = OutputFormat(
    "deepseek-v3",
    special=True,
    begin=(_ALL_BEGIN, _BEGIN),
    stray=(_ALL_END, _END),
    read_call=_read,
    write_calls=partial(_write, fenced=True),
)
DEEPSEEK_V31 = OutputFormat(
    "deepseek-v3.1",
    special=True,
    begin=(_ALL_BEGIN, _BEGIN),
    stray=(_ALL_END, _END),
    read_call=_read,
    write_calls=partial(_write, fenced=False),
)
