"""Rewrites llguidance's error messages about a grammar for the client that sent it."""

import json
import re
from collections.abc import Callable, Mapping

from pydantic import JsonValue

_LONGEST = 300
_DEAD_END = "NoExtension"
"""llguidance's error if no token is allowed."""
_LINE_OF_SOURCE = re.compile(r"\s*\d+ \| ")
_JSON_IN_LARK = re.compile(r"at (\d+)\(\d+\): failed to compile JSON schema: (.*)", re.DOTALL)
_JSON = re.compile(r"%json (\{.*\})$")
_NAMED = "$comment"
"""The keyword that holds the owner of a schema within a larger grammar."""

_REASONS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"regex parse error:\s*(.*?)\s+\^.*error: (.*)",
        lambda found: f"the pattern {found[1]!r} cannot be used: {found[2]}",
    ),
    (
        r"lookarounds not supported.* in regex /(.*)/",
        lambda found: f"the pattern {found[1]!r} has a word boundary, which cannot be enforced",
    ),
    (r"Unimplemented keys: \[(.*)\]", lambda found: f"{found[1].replace(chr(34), chr(39))} cannot be enforced here"),
    (r"oneOf constraints are not supported", lambda _: "oneOf is enforced only where its schemas exclude each other"),
    (r"Unknown format: (.*)", lambda found: f"the format {found[1]!r} cannot be enforced"),
    (r"(?:Pointer|Anchor) '(.*)' does not exist", lambda found: f"$ref: '#{found[1]}' is not in the schema"),
    (
        r"Resource '(.*)' is not present",
        lambda found: f"$ref: {found[1]!r} is another document; references must stay within the schema",
    ),
    (r"Invalid URI reference '(.*)'", lambda found: f"$id or $ref: {found[1]!r} is not a URI reference"),
    (
        r"required property '(.*)' is unsatisfiable",
        lambda found: f"nothing matches the schema: the required property {found[1]!r} can have no value",
    ),
    (r"Unsatisfiable schema: schema is false", lambda _: "nothing matches the schema: a schema is false"),
    (
        r"Unsatisfiable schema: minItems \((\d+)\) is greater than maxItems \((\d+)\)",
        lambda found: f"nothing matches the schema: minItems is {found[1]} and maxItems {found[2]}",
    ),
    (r"Unsatisfiable schema", lambda _: "nothing matches the schema: its keywords contradict each other"),
    (
        r"min/maxProperties only supported",
        lambda _: "minProperties and maxProperties can be enforced only where all of properties are required",
    ),
    (
        r"regexes /(.*)/ and /(.*)/ are not disjoint",
        lambda found: f"the patternProperties {found[1]!r} and {found[2]!r} overlap, which cannot be enforced",
    ),
    (r"multipleOf.* too many digits", lambda _: "multipleOf has too many digits"),
    (r"too (large|many)|limit", lambda _: "the schema is too large"),
    (r"unknown field `(.*?)`", lambda found: f"x-guidance: there is no option {found[1]!r}"),
)
"""Patterns of llguidance's errors about JSON Schemas, and the messages for them. The first match counts."""


def explain(error: str, *, syntax: str, source: str) -> str:
    """Returns the error on one line. ``source`` is the grammar whose lines the error refers to."""
    if error.startswith(_DEAD_END):
        return "no token can follow, so nothing matches it"
    if match := _JSON_IN_LARK.match(error):
        return _short(_owner(source, int(match[1])) + _about_schema(_without_source(match[2])))
    text = _without_source(error)
    return _short(_about_schema(text) if syntax == "json_schema" else text)


def named(schema: Mapping[str, JsonValue], owner: str) -> dict[str, JsonValue]:
    """Returns a schema for use in a larger grammar. Errors about it will begin with ``owner``."""
    return {**schema, _NAMED: owner}


def _owner(source: str, line: int) -> str:
    lines = source.splitlines()
    match = _JSON.search(lines[line - 1]) if line <= len(lines) else None
    owner = json.loads(match[1]).get(_NAMED) if match is not None else None
    return f"{owner}: " if isinstance(owner, str) else ""


def _about_schema(text: str) -> str:
    for pattern, reason in _REASONS:
        if match := re.search(pattern, text):
            return reason(match)
    return "the schema cannot be turned into a grammar"


def _without_source(error: str) -> str:
    lines = error.removesuffix("<non-verbose/>").splitlines()
    shown = next((at for at, line in enumerate(lines) if _LINE_OF_SOURCE.match(line)), len(lines))
    return " ".join(" ".join(lines[:shown]).split())


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
