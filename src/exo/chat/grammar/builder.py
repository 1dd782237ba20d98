"""Builds grammars in llguidance's dialect of Lark.

llguidance documents the syntax in docs/syntax.md and docs/json_schema.md: ``<[7]>`` is the token with id 7, ``%json`` a
value that follows a JSON Schema, and a rule with ``suffix`` is text up to the first occurrence of that suffix.
"""

import json
import re
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from exo.chat.grammar.tool_schema import Tool

# JSON in the spacing that models have learned. If any white space is allowed, some models write it without end.
_GUIDANCE: dict[str, JsonValue] = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "coerce_one_of": True,
}
_UNESCAPED_SLASH = re.compile(r"(\\.)|/", re.DOTALL)
_PLACE = re.compile('("NAME"|NAME|INDEX|ARGUMENTS)')


class GrammarBuilder:
    """Collects rules. The methods return expressions, to be used in other rules."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        """``special_tokens`` maps the text of control tokens to ids. Such a text is allowed only as its token."""
        self._special = special_tokens
        longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._rules: list[str] = []

    def source(self, start: str) -> str:
        """Returns the grammar whose output must match the expression ``start``."""
        return "\n".join([f"start: {start}", *self._rules, ""])

    def rule(self, body: str, options: str = "") -> str:
        """Adds a rule."""
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def marked(self, text: str) -> str:
        """``text``, in which control tokens are tokens."""
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

    def call(self, tools: Sequence[Tool], syntax: str) -> str:
        """A call of one of ``tools``.

        In ``syntax``, NAME (in quotes for a JSON string), INDEX and ARGUMENTS stand for the parts of the call. The rest
        is written as it is, with control tokens as tokens.
        """

        def written(piece: str, tool: Tool) -> str:
            match piece:
                case '"NAME"':
                    return self.plain(json.dumps(tool.name))
                case "NAME":
                    return self.plain(tool.name)
                case "INDEX":
                    return "/[0-9]{1,3}/"
                case "ARGUMENTS":
                    return self.json(tool.schema)
                case _:
                    return self.marked(piece)

        pieces = _PLACE.split(syntax)
        return self.one_of([self.sequence(*[written(piece, tool) for piece in pieces]) for tool in tools])

    def embedded(self, syntax: str, source: str) -> str:
        """A client's grammar. ``syntax`` is "json_schema", "regex" or "lark"."""
        match syntax:
            case "json_schema":
                return self.rule(f"%json {source}")
            case "regex":
                on_one_line = _UNESCAPED_SLASH.sub(lambda slash: slash[1] or r"\/", source).replace("\n", r"\n")
                return self.rule(f"/{on_one_line}/")
            case _:
                return self.rule(f"%lark {{\n{source}\n}}")

    def text_until(self, marker: str) -> str:
        """Any text without ``marker``, then ``marker``."""
        if (match := self._any_special.match(marker)) is None:
            return self.rule("/(?s:.*)/", f"[suffix={self.plain(marker)}]")
        return self.rule(f"/(?s:.*)/ {self.marked(match[0])} {self.marked(marker[match.end() :])}")

    def sequence(self, *expressions: str) -> str:
        """The expressions one after the other."""
        return self.rule(" ".join(filter(None, expressions)))

    def several(self, expression: str, between: str, allowed: bool) -> str:
        """One or more of ``expression`` with the text ``between`` them. Exactly one unless more are ``allowed``."""
        if not allowed:
            return expression
        return self.rule(f"{expression} ({self.plain(between)} {expression})*")

    def listed(self, members: Sequence[tuple[str, bool]], between: str) -> str:
        """The members in order with the text ``between`` them. Members whose flag is false are optional."""
        separator = self.plain(between)
        # ``first`` is the rest of the list if no member has been written yet, ``after`` the rest otherwise.
        first, after = '""', '""'
        for member, required in reversed(members):
            begun = self.sequence(member, after)
            first = begun if required else self.one_of([begun, first])
            later = self.sequence(separator, member)
            after = self.sequence(later if required else f"{later}?", after)
        return first

    def one_of(self, expressions: Sequence[str]) -> str:
        """Any one of the expressions."""
        return self.rule(" | ".join(expressions))
