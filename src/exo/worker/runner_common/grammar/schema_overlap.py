"""Decides whether a value can match two JSON Schemas at once. "No" is certain, "yes" is not."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeGuard

from pydantic import JsonValue

Schema = dict[str, JsonValue]

# Limits of nesting, and of schemas, values and properties examined. Beyond them, schemas count as overlapping.
_DEPTH = 8
_WORK = 20_000


def disjoint(schemas: Sequence[JsonValue], root: JsonValue) -> bool:
    """Whether no value can match two of ``schemas``. Their references point into ``root``."""
    comparison = _Overlap(root)
    return all(comparison.apart(one, other, _DEPTH) for one, other in combinations(schemas, 2))


def resolve(schema: JsonValue, root: JsonValue) -> JsonValue:
    """Returns the target of a schema with a reference into ``root``, or the schema itself if it has none."""
    for _ in range(_DEPTH):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        target = target_of(schema["$ref"], root)
        if target is None:
            break
        schema = target
    return schema


def target_of(reference: JsonValue, root: JsonValue) -> JsonValue:
    """Returns the schema within ``root`` that a ``$ref`` refers to, or None."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found = root
    for step in reference[2:].split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found


@dataclass
class _Overlap:
    root: JsonValue
    left: int = _WORK

    def apart(self, one: JsonValue, other: JsonValue, depth: int) -> bool:
        """Whether no value matches both."""
        if self.left < 0 or depth < 0:
            return False
        if one is False or other is False:
            return True
        ones, others = list(self._conjuncts(one, depth)), list(self._conjuncts(other, depth))
        types, other_types = _types(ones), _types(others)
        if not types & other_types:
            return True
        values, other_values = _values(ones), _values(others)
        if values is not None and other_values is not None and not values & other_values:
            return True
        if any(self._alternatives_apart(each, other, depth) for each in ones):
            return True
        if any(self._alternatives_apart(each, one, depth) for each in others):
            return True
        return {"object"} in (types, other_types) and self._properties_apart(ones, others, depth)

    def _conjuncts(self, schema: JsonValue, depth: int) -> Iterator[Schema]:
        """Yields schemas that every value of ``schema`` matches."""
        if not isinstance(schema, dict) or depth < 0 or self.left < 0:
            return
        self.left -= 1 + sum(len(each) for each in (schema.get("enum"), schema.get("properties")) if _is_table(each))
        yield schema
        if (target := target_of(schema.get("$ref"), self.root)) is not None:
            yield from self._conjuncts(target, depth - 1)
        both = schema.get("allOf")
        for each in both if isinstance(both, list) else []:
            yield from self._conjuncts(each, depth - 1)

    def _alternatives_apart(self, schema: Schema, other: JsonValue, depth: int) -> bool:
        """Whether no alternative of ``schema`` overlaps ``other``."""
        alternatives = schema.get("anyOf") or schema.get("oneOf")
        if not isinstance(alternatives, list) or not alternatives:
            return False
        return all(self.apart(each, other, depth - 1) for each in alternatives)

    def _properties_apart(self, ones: list[Schema], others: list[Schema], depth: int) -> bool:
        """Whether a required property would need two values at once."""
        one, other = _properties(ones), _properties(others)
        lists = [names for schema in (*ones, *others) if isinstance(names := schema.get("required"), list)]
        required = {str(name) for names in lists for name in names}
        return any(self.apart(one[name], other[name], depth - 1) for name in one if name in other and name in required)


def _is_table(value: JsonValue) -> TypeGuard[list[JsonValue] | Schema]:
    return isinstance(value, list | dict)


def _types(conjuncts: list[Schema]) -> set[str]:
    """Returns the types that a value may have. A "number" is an "integer" or a "fraction"."""
    found = {"null", "boolean", "object", "array", "integer", "fraction", "string"}
    for schema in conjuncts:
        kinds = schema.get("type")
        if kinds is not None:
            named = {str(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])}
            found &= named | ({"integer", "fraction"} if "number" in named else set())
        if (values := listed(schema)) is not None:
            found &= {type_of(each) for each in values}
    return found


def type_of(value: JsonValue) -> str:
    """Returns a value's type in JSON Schema, with "integer" or "fraction" for a number."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "fraction"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def listed(schema: Schema) -> list[JsonValue] | None:
    """Returns the values that ``const`` or ``enum`` allows, or None if any is allowed."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) else None


def _values(conjuncts: list[Schema]) -> set[str] | None:
    """Returns the values that ``const`` and ``enum`` allow in one notation, or None if any is allowed."""
    found: set[str] | None = None
    for schema in conjuncts:
        if (values := listed(schema)) is not None:
            written = {json.dumps(_canonical(each), sort_keys=True) for each in values}
            found = written if found is None else found & written
    return found


def _canonical(value: JsonValue) -> JsonValue:
    """Returns the value with equal numbers written alike."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_canonical(each) for each in value]
    return {key: _canonical(each) for key, each in value.items()} if isinstance(value, dict) else value


def _properties(conjuncts: list[Schema]) -> dict[str, JsonValue]:
    found: dict[str, JsonValue] = {}
    for schema in conjuncts:
        if isinstance(named := schema.get("properties"), dict):
            found |= named
    return found
