"""What a tool's JSON Schema says about one argument that a model wrote as bare text.

"7" may be a text or a number. Where the schema accepts the text as a string, it is one. This reading of a schema is
lenient: it decides how to read an argument, and validates nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

_MOST_SUBSCHEMAS = 200
_OTHER_TYPES = {
    "properties",
    "required",
    "additionalProperties",
    "patternProperties",
    "items",
    "prefixItems",
    "minItems",
    "maxItems",
    "minimum",
    "maximum",
    "multipleOf",
}
"""Keywords that say nothing about strings. A schema without a type that has one of them does not mean a string."""
_RULES = {"pattern", "format", "minLength", "maxLength", "not", "if"}


@dataclass(frozen=True, slots=True)
class Strings:
    """Strings that a schema accepts: those of ``texts``, or else all, of which ``ruled`` leaves some out."""

    texts: frozenset[str] | None = None
    ruled: bool = False

    @property
    def every(self) -> bool:
        """Whether every string is accepted."""
        return self.texts is None and not self.ruled

    def __or__(self, other: "Strings") -> "Strings":
        if self.every or other.every:
            return Strings()
        if self.texts is None or other.texts is None:
            return Strings(ruled=True)
        return Strings(self.texts | other.texts)

    def __and__(self, other: "Strings") -> "Strings":
        if self.texts is None or other.texts is None:
            texts = other.texts if self.texts is None else self.texts
            return Strings(texts, texts is None and (self.ruled or other.ruled))
        return Strings(self.texts & other.texts)

    def accept(self, text: str) -> bool:
        """Whether this text is accepted, as far as can be told without trying patterns and the like."""
        return self.texts is None or text in self.texts


_NONE = Strings(frozenset())


def strings(schema: JsonValue, root: Mapping[str, JsonValue]) -> Strings:
    """The strings that ``schema`` accepts. ``root`` is the document that its references point into."""
    return _Reading(root).strings(schema)


def argument_schema(parameters: Mapping[str, JsonValue], name: str) -> JsonValue:
    """The schema of argument ``name`` of a tool with these ``parameters``; None where they do not tell."""
    found: list[JsonValue] = []
    others: list[JsonValue] = []
    for schema in _Reading(parameters).alternatives():
        properties = schema.get("properties")
        if isinstance(properties, dict) and name in properties:
            found.append(properties[name])
        elif isinstance(other := schema.get("additionalProperties"), dict):
            others.append(other)
    schemas = found or others
    return {"anyOf": schemas} if len(schemas) > 1 else schemas[0] if schemas else None


def argument_names(parameters: Mapping[str, JsonValue]) -> frozenset[str] | None:
    """The arguments that a tool with these ``parameters`` has; None where it may have any."""
    names: set[str] = set()
    for schema in _Reading(parameters).alternatives():
        properties = schema.get("properties")
        if isinstance(properties, dict):
            names |= properties.keys()
        if schema.get("additionalProperties") or schema.get("patternProperties"):
            return None
    return frozenset(names) or None


class _Reading:
    """One look at a schema, which ends however its references lead in circles."""

    def __init__(self, root: Mapping[str, JsonValue]) -> None:
        self._root = root
        self._left = _MOST_SUBSCHEMAS
        self._references: set[str] = set()

    def strings(self, schema: JsonValue) -> Strings:
        if schema is False:
            return _NONE
        if not isinstance(schema, dict):
            return Strings()
        self._left -= 1
        if self._left < 0:
            return Strings(ruled=True)
        found = Strings(ruled=not _RULES.isdisjoint(schema))
        kind = schema.get("type")
        kinds = kind if isinstance(kind, list) else [kind]
        if "string" not in kinds and (kind is not None or not _OTHER_TYPES.isdisjoint(schema)):
            return _NONE
        if isinstance(choices := schema.get("enum"), list):
            found &= Strings(frozenset(choice for choice in choices if isinstance(choice, str)))
        if "const" in schema:
            constant = schema["const"]
            found &= Strings(frozenset([constant])) if isinstance(constant, str) else _NONE
        if isinstance(reference := schema.get("$ref"), str):
            found &= self._referred(reference)
        for each in _listed(schema, "allOf"):
            found &= self.strings(each)
        for keyword in ("anyOf", "oneOf"):
            if choices := _listed(schema, keyword):
                union = _NONE
                for each in choices:
                    union |= self.strings(each)
                found &= union
        return found

    def alternatives(self) -> Iterator[Mapping[str, JsonValue]]:
        """The whole schema and all that it is put together from: each may describe some of an object's properties."""
        waiting: list[JsonValue] = [dict(self._root)]
        while waiting and self._left > 0:
            self._left -= 1
            each = waiting.pop()
            if isinstance(each, dict):
                yield each
                for keyword in ("allOf", "anyOf", "oneOf"):
                    waiting += _listed(each, keyword)
                if isinstance(reference := each.get("$ref"), str):
                    waiting.append(self._resolved(reference))

    def _referred(self, reference: str) -> Strings:
        """A reference that leads to itself adds nothing."""
        if reference in self._references:
            return _NONE
        self._references.add(reference)
        found = self.strings(self._resolved(reference))
        self._references.remove(reference)
        return found

    def _resolved(self, reference: str) -> JsonValue:
        """What a reference within the document points at; a schema of nothing certain where it points elsewhere."""
        pointer, *steps = reference.split("/")
        at: JsonValue = dict(self._root)
        for step in steps if pointer == "#" else [reference]:
            key = step.replace("~1", "/").replace("~0", "~")
            found = _items(at).get(key)
            if found is None:
                return {"not": False}
            at = found
        return at


def _items(value: JsonValue) -> dict[str, JsonValue]:
    if isinstance(value, list):
        return {str(place): item for place, item in enumerate(value)}
    return value if isinstance(value, dict) else {}


def _listed(schema: Mapping[str, JsonValue], keyword: str) -> list[JsonValue]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []
