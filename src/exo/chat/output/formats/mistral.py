"""Mistral's two formats: ``[TOOL_CALLS][{"name": …, "arguments": {…}}]`` and ``[TOOL_CALLS]name[ARGS]{…}``.

Published in the repository mistralai/mistral-common: its tokenizers v3 and v7 write the array, v11 and later the names,
some of them with "[CALL_ID]" and an id before the arguments.
"""

import re
from collections.abc import Sequence

from exo.chat.grammar.builder import Grammar
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.format import OutputFormat
from exo.chat.output.json_call import LONGEST_NAME, json_call, write_json_call
from exo.chat.output.parser import Reply
from exo.chat.output.scanner import Steps

_BEGIN, _ID, _ARGUMENTS, _END = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[/TOOL_CALLS]"
_NAME = re.compile(r"[^\[\]{}\s\"]*")


def _read(reply: Reply, marker: str) -> Steps[bool]:
    yield from reply.scanner.space()
    if (yield from reply.scanner.peek()) == "[":
        return (yield from _array(reply, marker))
    return (yield from _named(reply))


def _array(reply: Reply, marker: str) -> Steps[bool]:
    scanner = reply.scanner
    yield from scanner.either("[")
    while True:
        yield from scanner.space()
        if not (yield from json_call(reply, marked=bool(marker))):
            return False
        yield from scanner.space()
        if (yield from scanner.either(",", "]")) != ",":
            return True  # a missing end is forgiven
        reply.next_call(",")
        yield from scanner.space()
        if (yield from scanner.either("]")):
            return True


def _named(reply: Reply) -> Steps[bool]:
    scanner = reply.scanner
    name = yield from scanner.run(_NAME, LONGEST_NAME)
    if (yield from scanner.either(_ARGUMENTS, _ID)) == _ID:
        yield from scanner.run(_NAME, LONGEST_NAME)
        yield from scanner.either(_ARGUMENTS)
    yield from scanner.space()
    if not name or (yield from scanner.peek()) != "{":
        return False
    yield reply.call(name)
    return (yield from reply.json_arguments())


def _write_array(grammar: Grammar, tools: Sequence[Tool], parallel: bool) -> str:
    calls = grammar.several(write_json_call(grammar, tools), ", ", parallel)
    return grammar.sequence(grammar.marked(_BEGIN + "["), calls, grammar.plain("]"))


def _write_named(grammar: Grammar, tools: Sequence[Tool], parallel: bool) -> str:
    calls = [
        grammar.sequence(grammar.plain(tool.name), grammar.marked(_ARGUMENTS), grammar.json(tool.schema))
        for tool in tools
    ]
    return grammar.several(grammar.sequence(grammar.marked(_BEGIN), grammar.one_of(calls)), "", parallel)


MISTRAL = OutputFormat(
    "mistral", special=True, begin=(_BEGIN,), stray=(_END,), read_call=_read, write_calls=_write_named
)
MISTRAL_ARRAY = OutputFormat(
    "mistral-array", special=True, begin=(_BEGIN,), stray=(_END,), read_call=_read, write_calls=_write_array
)
