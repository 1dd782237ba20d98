"""Converts patterns of JSON Schemas to the regular expressions of grammars, which have no look-ahead.

A look-ahead at the start of a pattern restricts the same text as the rest, so it becomes a pattern of its own.
"""

import re
from collections.abc import Iterator

_CLASS = r"\[\^?(?:\\.|[^\]\\])*\]"
_ONE = rf"(?:{_CLASS}|\\[^A-Za-z0-9]|\\[dws]|[^\\\[\](){{}}|?*+^$.])"
"""One character: a class, an escape or a literal."""
_NOT_FIRST = re.compile(rf"({_ONE})")
_NOT_ONLY = re.compile(rf"\^?({_CLASS})([*+])\$")
_NOT_TWICE = re.compile(rf"\.\*({_ONE})({_ONE})")
_NOT_ANYWHERE = re.compile(rf"\.\*({_ONE})")
_TOKEN = re.compile(rf"\\.|{_CLASS}|\(\?<?[=!]|[(|)]|[^\\\[(|)]+|.", re.DOTALL)
_BEYOND = re.compile(r"\(\?<?[=!]|\\[1-9]|\\[bBk]")


def is_beyond_grammars(pattern: str) -> bool:
    """Whether ``pattern`` has look-around, a back-reference or a word boundary."""
    return any(_BEYOND.match(token) for token in _TOKEN.findall(pattern))


def without_look_ahead(pattern: str) -> list[str] | None:
    """Returns patterns that together match the same texts as ``pattern``, or None if it cannot be converted."""
    if not is_beyond_grammars(pattern):
        return [pattern]
    if not pattern.startswith("^"):
        return None
    conjuncts: list[str] = []
    rest = pattern[1:]
    while rest.startswith(("(?=", "(?!")):
        end = _end_of_group(rest)
        if end is None:
            return None
        inner = rest[3 : end - 1]
        conjunct = f"^(?:{inner})" if rest[2] == "=" else _complement(inner)
        if conjunct is None or is_beyond_grammars(conjunct):
            return None
        conjuncts.append(conjunct)
        rest = rest[end:]
    if is_beyond_grammars(rest) or rest[:1] in ("*", "+", "?", "{") or _has_alternatives(rest):
        return None
    return [f"^{rest}", *conjuncts]


def _complement(inner: str) -> str | None:
    """Returns a pattern of the texts at whose start ``inner`` does not match, or None unless it has a simple form."""
    if match := _NOT_ONLY.fullmatch(inner):
        return _other_than(match[1]) if match[2] == "*" else f"^$|{_other_than(match[1])}"
    if match := _NOT_FIRST.fullmatch(inner):
        return f"^(?:{_other_than(match[1])}|$)"
    # "." stops at a line's end. The patterns below exclude the character from all lines of a text.
    if (match := _NOT_TWICE.fullmatch(inner)) and match[1] == match[2]:
        other = _other_than(match[1])
        return f"^{other}*(?:{match[1]}{other}+)*{match[1]}?$"
    if match := _NOT_ANYWHERE.fullmatch(inner):
        return f"^{_other_than(match[1])}*$"
    return None


def _other_than(one: str) -> str:
    """Returns a pattern of any character but ``one``."""
    if one.startswith("[^"):
        return f"[{one[2:]}"
    return f"[^{one[1:]}" if one.startswith("[") else f"[^{one}]"


def _tokens(pattern: str) -> Iterator[tuple[str, int, int]]:
    """Yields each token with its end and the nesting depth of groups after it."""
    depth = 0
    for match in _TOKEN.finditer(pattern):
        depth += match[0].startswith("(") - (match[0] == ")")
        yield match[0], match.end(), depth


def _end_of_group(pattern: str) -> int | None:
    return next((end for token, end, depth in _tokens(pattern) if token == ")" and depth == 0), None)


def _has_alternatives(pattern: str) -> bool:
    """Whether there is an alternation outside of all groups."""
    return any(token == "|" and depth == 0 for token, _, depth in _tokens(pattern))
