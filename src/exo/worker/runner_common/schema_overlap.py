"""Whether a value can match two JSON Schemas at once. The answer "no" is certain, "yes" is not."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeGuard

from pydantic import JsonValue

Schema = dict[str, JsonValue]

_DEPTH = 8
_WORK = 20_000
"""Schemas, values and properties that are looked at; whatever is beyond counts as overlapping."""


def disjoint(schemas: Sequence[JsonValue], root: JsonValue) -> bool:
    """Whether no value can match two of ``schemas``. ``root`` is what their references refer to."""
    comparison = _Comparison(root)
    return all(comparison.apart(one, other, _DEPTH) for one, other in combinations(schemas, 2))


def resolve(schema: JsonValue, root: JsonValue) -> JsonValue:
    """What a schema that is nothing but a reference within ``root`` refers to, else the schema itself."""
    for _ in range(_DEPTH):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        target = target_of(schema["$ref"], root)
        if target is None:
            break
        schema = target
    return schema


def target_of(reference: JsonValue, root: JsonValue) -> JsonValue:
    """The schema within ``root`` that a ``$ref`` refers to; None where there is none."""
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
class _Comparison:
    root: JsonValue
    left: int = _WORK

    def apart(self, one: JsonValue, other: JsonValue, depth: int) -> bool:
        """Whether no value matches both."""
        if self.left < 0 or depth < 0:
            return False
        if one is False or other is False:
            return True
        ones, others = list(self._conjuncts(one, depth)), list(self._conjuncts(other, depth))
        if not _types(ones) & _types(others) or _values_apart(ones, others):
            return True
        if any(self._alternatives_apart(each, other, depth) for each in ones):
            return True
        if any(self._alternatives_apart(each, one, depth) for each in others):
            return True
        return "object" in (*_only(ones), *_only(others)) and self._properties_apart(ones, others, depth)

    def _conjuncts(self, schema: JsonValue, depth: int) -> Iterator[Schema]:
        """Schemas all of which a value of ``schema`` matches."""
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
        """Whether every alternative of ``schema`` is apart from ``other``."""
        alternatives = schema.get("anyOf") or schema.get("oneOf")
        if not isinstance(alternatives, list) or not alternatives:
            return False
        return all(self.apart(each, other, depth - 1) for each in alternatives)

    def _properties_apart(self, ones: list[Schema], others: list[Schema], depth: int) -> bool:
        """Whether objects of both would need two values of one property."""
        one, other, required = _properties(ones), _properties(others), _required([*ones, *others])
        return any(self.apart(one[name], other[name], depth - 1) for name in one if name in other and name in required)


def _is_table(value: JsonValue) -> TypeGuard[list[JsonValue] | Schema]:
    return isinstance(value, list | dict)


def _types(conjuncts: list[Schema]) -> set[str]:
    """The types that a value may have; an integer is a number as well."""
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
    """JSON Schema's word, except that a number is an integer or a fraction."""
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
    """The values that ``const`` or ``enum`` allows; None: any."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) else None


def _only(conjuncts: list[Schema]) -> set[str]:
    """The one type that a value must have, if there is one."""
    types = _types(conjuncts)
    return types if len(types) == 1 else set()


def _values_apart(ones: list[Schema], others: list[Schema]) -> bool:
    one, other = _values(ones), _values(others)
    return one is not None and other is not None and not one & other


def _values(conjuncts: list[Schema]) -> set[str] | None:
    """The values that ``const`` and ``enum`` allow, in one notation; None: any."""
    found: set[str] | None = None
    for schema in conjuncts:
        if (values := listed(schema)) is not None:
            written = {json.dumps(_canonical(each), sort_keys=True) for each in values}
            found = written if found is None else found & written
    return found


def _canonical(value: JsonValue) -> JsonValue:
    """Equal numbers alike."""
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


def _required(conjuncts: list[Schema]) -> set[str]:
    found: set[str] = set()
    for schema in conjuncts:
        if isinstance(names := schema.get("required"), list):
            found |= {str(name) for name in names}
    return found
