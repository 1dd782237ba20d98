"""Writing grammars in llguidance's dialect of Lark.

Its syntax is described in docs/syntax.md and docs/json_schema.md of the repository guidance-ai/llguidance: ``<[7]>`` is
the token with id 7, ``%json`` a value that follows a JSON Schema, and a rule with ``suffix`` is text up to the first
place where that suffix comes.
"""

import json
import re
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

_GUIDANCE: dict[str, JsonValue] = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "coerce_one_of": True,
}
"""JSON as models have learned to write it. Where any white space is allowed, some models write it for ever."""


_UNESCAPED_SLASH = re.compile(r"(\\.)|/", re.DOTALL)


class Grammar:
    """Rules being collected. What the methods return are expressions, to be put into other rules."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        """``special_tokens`` are the ids of control tokens by text: such a marker is reachable by its token alone."""
        self._special = special_tokens
        longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._rules: list[str] = []

    def source(self, start: str) -> str:
        """The whole grammar, of which ``start`` is the expression that the output must match."""
        return "\n".join([f"start: {start}", *self._rules, ""])

    def rule(self, body: str) -> str:
        """A rule of its own."""
        return self._rule("", body)

    def marked(self, text: str) -> str:
        """``text``, with control tokens where it has any."""
        pieces: list[str] = []
        at = 0
        for match in self._any_special.finditer(text):
            pieces += [self.plain(text[at : match.start()]), f"<[{self._special[match[0]]}]>"]
            at = match.end()
        return " ".join(filter(None, [*pieces, self.plain(text[at:])]))

    def plain(self, text: str) -> str:
        """``text`` in ordinary tokens."""
        return json.dumps(text, ensure_ascii=False) if text else ""

    def json(self, schema: JsonValue) -> str:
        """A JSON value that follows ``schema``."""
        guided = {"x-guidance": _GUIDANCE, **schema} if isinstance(schema, dict) else schema
        return self.rule(f"%json {json.dumps(guided)}")

    def embedded(self, syntax: str, source: str) -> str:
        """A grammar of a client's. ``syntax`` is "json_schema", "regex" or "lark"."""
        match syntax:
            case "json_schema":
                return self.rule(f"%json {source}")
            case "regex":
                on_one_line = _UNESCAPED_SLASH.sub(lambda slash: slash[1] or r"\/", source).replace("\n", r"\n")
                return self.rule(f"/{on_one_line}/")
            case _:
                return self.rule(f"%lark {{\n{source}\n}}")

    def text_until(self, marker: str) -> str:
        """Any text, and the ``marker`` behind it, which is not in it."""
        if (match := self._any_special.match(marker)) is None:
            return self._rule(f"[suffix={self.plain(marker)}]", "/(?s:.*)/")
        return self.rule(f"/(?s:.*)/ {self.marked(match[0])} {self.marked(marker[match.end() :])}")

    def sequence(self, *expressions: str) -> str:
        """One after the other."""
        return self.rule(" ".join(filter(None, expressions)))

    def several(self, expression: str, between: str, allowed: bool) -> str:
        """One or more of these with the text ``between`` them; only one unless more are ``allowed``."""
        if not allowed:
            return expression
        return self.rule(f"{expression} ({self.plain(between)} {expression})*")

    def listed(self, members: Sequence[tuple[str, bool]], between: str) -> str:
        """These one after the other with the text ``between`` them; those whose flag is false may be missing."""
        separator = self.plain(between)
        first, after = '""', '""'
        for member, required in reversed(members):
            begun = self.sequence(member, after)
            first = begun if required else self.one_of([begun, first])
            later = self.sequence(separator, member)
            after = self.sequence(later if required else f"{later}?", after)
        return first

    def one_of(self, expressions: Sequence[str]) -> str:
        """Any one of these."""
        return self.rule(" | ".join(expressions))

    def _rule(self, options: str, body: str) -> str:
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name
