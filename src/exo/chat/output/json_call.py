"""A call written as one JSON object: ``{"name": …, "arguments": {…}}``, or with "parameters"."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from exo.chat.grammar.builder import Grammar
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.json_scanner import JsonObject, loose_json
from exo.chat.output.parser import Reply
from exo.chat.output.scanner import Scanner, Steps

LONGEST_NAME = 256
"""Characters; what is longer names no tool."""

_STRING_PIECES = {quote: re.compile(rf"[^{quote}\\\x00-\x1f]*") for quote in "\"'"}
_ANY = re.compile(r"[^\x00-\x1f]*")
_NAME = ("name", "tool_name")
_ARGUMENTS = ("arguments", "parameters")
_ASIDE = ("type", "id", "tool_call_id")


def write_json_call(grammar: Grammar, tools: Sequence[Tool], key: str = "arguments") -> str:
    """The expression of such an object for one of ``tools``, with the arguments under ``key``."""
    return grammar.one_of(
        [
            grammar.sequence(
                grammar.plain(f'{{"name": {json.dumps(tool.name)}, "{key}": '),
                grammar.json(tool.schema),
                grammar.plain("}"),
            )
            for tool in tools
        ]
    )


@dataclass(slots=True)
class _Found:
    name: str | None = None
    early: str | None = None
    """Arguments that came before the name."""
    begun: bool = False
    whole: bool = False
    """The call has its name and its arguments, whatever comes behind them."""
    held: bool = False
    """The call begins when the whole object is read. Only a tool of the request counts as its name."""


def json_call(reply: Reply, *, marked: bool) -> Steps[bool]:
    """Reads one such object; the call begins with its arguments. False where it is none, or is cut off.

    Unless something before the object has ``marked`` it as a call, one without arguments is none.
    """
    found = _Found()
    ended = yield from _members(reply, found)
    if found.whole:
        return True
    if not ended or found.name is None or (found.early is None and not marked):
        return False
    yield reply.call(found.name)
    yield reply.arguments(found.early or "{}")
    return True


def closing_json_calls(reply: Reply) -> Steps[bool]:
    """Reads such objects, which text came before. They are calls only if they end the reply.

    A model also writes such an object to explain a call. Each object must therefore name a tool of the request and
    have arguments that suit it, and no text may follow. The calls begin when all of this is known.
    """
    scanner = reply.scanner
    calls: list[tuple[str, str]] = []
    while not calls or (yield from scanner.peek()):
        found = _Found(held=True)
        ended = yield from _members(reply, found)
        if not ended or found.name is None or found.early is None or not reply.suits(found.name, found.early):
            return False
        calls.append((found.name, found.early))
        yield from scanner.space()
        yield from scanner.either(";")
        yield from scanner.space()
    for name, arguments in calls:
        yield reply.call(name)
        yield reply.arguments(arguments)
    return True


def _members(reply: Reply, found: _Found) -> Steps[bool]:
    """Reads an object. False where a member means nothing in a call, or the end is missing."""
    scanner = reply.scanner
    end = "," if (yield from scanner.either("{")) else ""
    while end == ",":
        if not (yield from _member(reply, found)):
            return False
        yield from scanner.space()
        end = yield from scanner.either(",", "}")
    return bool(end)


def _member(reply: Reply, found: _Found) -> Steps[bool]:
    scanner = reply.scanner
    yield from scanner.space()
    key = yield from json_string(scanner)
    yield from scanner.space()
    if key is None or not (yield from scanner.either(":")):
        return False
    yield from scanner.space()
    if key in _NAME and found.name is None:
        found.name = yield from json_string(scanner)
        return bool(found.name) and (not found.held or reply.offers(found.name or ""))
    if key in _ARGUMENTS and not found.begun and found.early is None:
        return (yield from _arguments(reply, found))
    return key in _ASIDE and (yield from json_string(scanner)) is not None


def _arguments(reply: Reply, found: _Found) -> Steps[bool]:
    begins = yield from reply.scanner.peek()
    if begins == '"':  # an object in a string, as OpenAI's API has it
        text = yield from json_string(reply.scanner, None)
        found.early = loose_json(text) if text and text.lstrip().startswith("{") else None
        return found.early is not None
    if begins != "{":
        return False
    if found.name is None or found.held:
        found.early = yield from _object(reply.scanner)
        return found.early is not None
    found.begun = True
    yield reply.call(found.name)
    found.whole = yield from reply.json_arguments()
    return found.whole


def _object(scanner: Scanner) -> Steps[str | None]:
    found = JsonObject()
    while not found.whole:
        if found.broken or not (yield from scanner.peek()):
            return None
        scanner.advance(found.read)
    return found.taken()


def json_string(scanner: Scanner, limit: int | None = LONGEST_NAME) -> Steps[str | None]:
    """Reads a JSON string of at most ``limit`` characters, perhaps in Python's quotes. None where there is none."""
    quote = yield from scanner.either('"', "'")
    if not quote:
        return None
    pieces: list[str] = []
    room = limit
    while room is None or room > 0:
        piece = yield from scanner.run(_STRING_PIECES[quote], room)
        if (end := (yield from scanner.either(quote, "\\"))) == "\\":
            piece += end + (yield from scanner.run(_ANY, 1))
        pieces.append(piece)
        room = None if room is None else room - len(piece)
        if end == quote:
            return _decoded("".join(pieces), quote)
        if not end:
            return None
    return None


def _decoded(inside: str, quote: str) -> str | None:
    escaped = inside.replace("\\'", "'").replace('"', '\\"') if quote == "'" else inside
    try:
        text: str = json.loads(f'"{escaped}"')
        text.encode()  # an escape may stand for half a character
    except ValueError:
        return None
    return text
