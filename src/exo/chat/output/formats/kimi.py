"""The format of Kimi K2: a section of calls, each named by an id such as ``functions.get_weather:0``.

Published in moonshotai's docs/tool_call_guidance.md beside the model.
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

_ALL_BEGIN, _ALL_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_BEGIN, _ARGUMENTS, _END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_ID = re.compile(r"[^\s<>{}\"]*")
_NUMBER = re.compile(r":[0-9]+$")


def _read(reply: Reply, marker: str) -> Steps[bool]:
    return (yield from reply.several(_BEGIN, _ALL_END, partial(_call, reply), begun=marker == _BEGIN))


def _call(reply: Reply) -> Steps[bool]:
    scanner = reply.scanner
    yield from scanner.space()
    identity = yield from scanner.run(_ID, LONGEST_NAME)
    yield from scanner.space()
    name = _NUMBER.sub("", identity.removeprefix("functions."))
    if not name or not (yield from scanner.either(_ARGUMENTS)):
        return False
    yield from scanner.space()
    if (yield from scanner.peek()) != "{":
        return False
    yield reply.call(name)
    if not (yield from reply.json_arguments()):
        return False
    yield from scanner.space()
    yield from scanner.either(_END)
    return True


def _write(grammar: Grammar, tools: Sequence[Tool], parallel: bool) -> str:
    calls = [
        grammar.sequence(
            grammar.plain(f"functions.{tool.name}:"),
            "/[0-9]{1,3}/",
            grammar.marked(_ARGUMENTS),
            grammar.json(tool.schema),
        )
        for tool in tools
    ]
    call = grammar.sequence(grammar.marked(_BEGIN), grammar.one_of(calls), grammar.marked(_END))
    return grammar.sequence(grammar.marked(_ALL_BEGIN), grammar.several(call, "", parallel), grammar.marked(_ALL_END))


KIMI = OutputFormat(
    "kimi", special=True, begin=(_ALL_BEGIN, _BEGIN), stray=(_ALL_END, _END), read_call=_read, write_calls=_write
)
