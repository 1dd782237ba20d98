"""Calls written as Python writes them: ``get_weather(city="Paris", days=3)``."""

import re
from collections.abc import Sequence

from exo.chat.grammar.builder import Grammar
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.call_fields import fields
from exo.chat.output.json_call import LONGEST_NAME
from exo.chat.output.parser import Reply
from exo.chat.output.python_literal import Notation, loose_call
from exo.chat.output.scanner import Steps

_NAME = re.compile(r"[\w.-]*")
_PYTHON = Notation(assign="=", close=")")


def python_calls(reply: Reply, *, listed: bool) -> Steps[bool]:
    """Reads calls with white space or commas between them; those ``listed`` are in brackets, one of which was read."""
    scanner = reply.scanner
    while True:
        yield from scanner.space()
        name = yield from scanner.run(_NAME, LONGEST_NAME)
        if not name or not (yield from scanner.either("(")):
            return False
        if not (yield from loose_call(reply, name, _PYTHON)):
            return False
        yield from scanner.space()
        if listed and (yield from scanner.either(",", "]")) != ",":
            return True  # a missing end is forgiven
        if not listed and not (yield from scanner.peek()).isidentifier():
            return True
        reply.next_call()


def write_python_calls(grammar: Grammar, tools: Sequence[Tool], parallel: bool, between: str) -> str:
    """The expression of one call, or of several with ``between`` them. Raises ``ValueError``."""
    calls: list[str] = []
    for tool in tools:
        members = [
            (grammar.sequence(grammar.plain(writable(field.name) + "="), grammar.json(field.schema)), field.required)
            for field in fields(tool)
        ]
        calls.append(
            grammar.sequence(
                grammar.plain(writable(tool.name) + "("), grammar.listed(members, ", "), grammar.plain(")")
            )
        )
    return grammar.several(grammar.one_of(calls), between, parallel)


def writable(name: str) -> str:
    """The same name. Raises ``ValueError`` where calls without quotes around names cannot have it."""
    if not name or not _NAME.fullmatch(name):
        raise ValueError(f"in this model's call format, nothing can be called {name!r}")
    return name
