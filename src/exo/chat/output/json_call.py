"""A call written as one JSON object: ``{"name": …, "arguments": {…}}``, or with "parameters"."""

import json
import re
from dataclasses import dataclass

from exo.chat.grammar.tool_schema import LONGEST_NAME
from exo.chat.output.json_scanner import JsonObject, loose_json
from exo.chat.output.parser import ReplyState
from exo.chat.output.scanner import Scanner, Steps

_STRING_PIECES = {quote: re.compile(rf"[^{quote}\\\x00-\x1f]*") for quote in "\"'"}
_ANY = re.compile(r"[^\x00-\x1f]*")
_NAME = ("name", "tool_name")
_ARGUMENTS = ("arguments", "parameters")
_ASIDE = ("type", "id", "tool_call_id")


@dataclass(slots=True)
class _JsonCall:
    name: str | None = None
    early: str | None = None
    """Arguments that precede the name, or that are held."""
    begun: bool = False
    whole: bool = False
    """Whether the call has its name and arguments, even if the object is not complete."""
    held: bool = False
    """Report the call only after the whole object, and only if the request has a tool of its name."""


def json_call(reply: ReplyState, marked: bool) -> Steps[bool]:
    """Reads one object, whose call begins with its arguments. Returns false if it is invalid or cut off.

    A call without arguments counts only if a marker before the object has ``marked`` it as a call.
    """
    found = _JsonCall()
    ended = yield from _members(reply, found)
    if found.whole:
        return True
    if not ended or found.name is None or (found.early is None and not marked):
        return False
    yield reply.call(found.name)
    yield reply.arguments(found.early or "{}")
    return True


def closing_json_calls(reply: ReplyState) -> Steps[bool]:
    """Reads objects that follow text. They are calls only if they end the reply.

    A model also writes such an object to explain a call. Therefore each object must name a tool of the request and have
    arguments that suit it, and no text may follow. No call is reported before that is certain.
    """
    scanner = reply.scanner
    calls: list[tuple[str, str]] = []
    while not calls or (yield from scanner.peek()):
        found = _JsonCall(held=True)
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


def _members(reply: ReplyState, found: _JsonCall) -> Steps[bool]:
    """Reads an object. Returns false if it has a member that no call has, or does not end."""
    scanner = reply.scanner
    end = "," if (yield from scanner.either("{")) else ""
    while end == ",":
        if not (yield from _member(reply, found)):
            return False
        yield from scanner.space()
        end = yield from scanner.either(",", "}")
    return bool(end)


def _member(reply: ReplyState, found: _JsonCall) -> Steps[bool]:
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


def _arguments(reply: ReplyState, found: _JsonCall) -> Steps[bool]:
    begins = yield from reply.scanner.peek()
    if begins == '"':  # an object in a string, as in OpenAI's API
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
    """Reads a string of at most ``limit`` characters, in JSON's or Python's quotes. Returns None if there is none."""
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
        text.encode()  # an escape may be a lone surrogate
    except ValueError:
        return None
    return text
