"""Values in a notation like JSON's, with other quotes and constants, and how such a notation writes arguments.

Python has ``True`` and ``'text'``, Gemma's notation ``<escape>text<escape>`` and keys without quotes.
"""

import json
import re
from dataclasses import dataclass

from exo.chat.output.scanner import Scanner, Steps, markers

_WORD = re.compile(r"[^\s=:,(){}\[\]<\"']*")
_AFTER_STRING = ("", ",", ":", ")", "]", "}")
_ANY = re.compile(r".*", re.DOTALL)
_LONGEST_WORD = 400
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_BRACKETS = {"(": "[", "[": "[", "{": "{", ")": "]", "]": "]", "}": "}"}
_ESCAPED = re.compile(r"\\(u[0-9A-Fa-f]{4}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": "", **{char: char for char in "\"'\\/"}}
"""Escapes by the character after the backslash. Before any other, a backslash stands for itself, as in Python."""


@dataclass(frozen=True, slots=True)
class Notation:
    """How arguments are written. ``close`` is one character."""

    assign: str
    close: str
    quotes: tuple[str, ...] = ()
    """Additional quotes. A string between them has no escapes."""


def loose_value(text: str) -> str | None:
    """Returns an object or array in a notation like JSON's as JSON, or None if it is invalid."""
    scanner = Scanner()
    scanner.feed(text)
    scanner.end(cut_off=False)
    steps = read_value(scanner, Notation(assign="", close=""))
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            value: str | None = stop.value
            return value if scanner.at_end else None


def read_value(scanner: Scanner, notation: Notation) -> Steps[str | None]:
    """Reads one value, up to a comma or the closing character, and returns it as JSON, or None if it is invalid."""
    tokens: list[str] = []
    depth = 0
    while True:
        yield from scanner.space()
        if depth == 0 and tokens and (yield from scanner.peek()) in (",", notation.close):
            return _checked("".join(tokens))
        token = yield from _token(scanner, notation)
        if token is None:
            return None
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        if depth < 0:
            return None
        if token in ("]", "}") and tokens[-1] == "," and tokens[-2] not in ("[", "{"):
            tokens.pop()  # a trailing comma
        if token == ":" and tokens and not tokens[-1].startswith('"'):
            tokens.append(json.dumps(tokens.pop()))  # a key without quotes
        tokens.append(token)


def _token(scanner: Scanner, notation: Notation) -> Steps[str | None]:
    """Reads one token and returns its JSON."""
    mark = yield from scanner.either(*notation.quotes, '"', "'", *_BRACKETS, ",", ":")
    if mark in notation.quotes:
        return (yield from _plain_string(scanner, mark))
    if mark in ('"', "'"):
        return (yield from _string(scanner, mark))
    if mark:
        return _BRACKETS.get(mark, mark)
    word = yield from scanner.run(_WORD, _LONGEST_WORD)
    if not word or _NUMBER.fullmatch(word):
        return word or None
    return _WORDS.get(word) or _quoted(word)


def _plain_string(scanner: Scanner, quote: str) -> Steps[str | None]:
    pieces: list[str] = []
    if not (yield from scanner.until(markers(quote), pieces.append)):
        return None
    return _quoted("".join(pieces))


def _string(scanner: Scanner, quote: str) -> Steps[str | None]:
    pieces: list[str] = []
    while end := (yield from scanner.until(markers(quote, "\\"), pieces.append)):
        if end == "\\":
            pieces += [end, (yield from scanner.run(_ANY, 1))]
            continue
        space = yield from scanner.space()
        if (yield from scanner.peek()) in _AFTER_STRING:
            return _quoted(_unescaped("".join(pieces)))
        pieces += [end, space]  # an unescaped apostrophe
    return None


def _unescaped(inside: str) -> str:
    try:
        return json.loads(f'"{inside}"', strict=False)
    except ValueError:
        return _ESCAPED.sub(lambda escape: _character(escape[1]), inside)


def _character(escape: str) -> str:
    return chr(int(escape[1:], 16)) if len(escape) > 1 else _ESCAPES.get(escape, f"\\{escape}")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _checked(value: str) -> str | None:
    try:
        json.loads(value)
        value.encode()  # an escape may be a lone surrogate
    except (ValueError, RecursionError):
        return None
    return value
