"""Seeded random JSON Schemas as people write them, and the check of a reply that had to follow one."""

import json
from collections.abc import Callable
from decimal import Decimal
from random import Random
from typing import Literal, final

import jsonschema_rs
from pydantic import JsonValue

Schema = dict[str, JsonValue]
Fate = Literal["valid", "invalid", "cut off", "refused"]

_DEPTH = 3
_WORDS = (
    "name",
    "age",
    "tags",
    "unit",
    "größe",
    "a b",
    'quote"',
    "x-1",
    "",
    "$ref",
    "__proto__",
    "items",
    "\n",
    "日本",
)
_PATTERNS = (
    "^[a-z]{2,6}$",
    "^(red|blue)-[0-9]+$",
    "^[A-Z]{3}$",
    "[0-9]{2}",
    "^\\d{4}-\\d{2}$",
    "^a.*z$",
    "^\\w+@\\w+$",
)
_FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
_RARE: tuple[Schema, ...] = (
    {"type": "object", "minProperties": 1, "maxProperties": 3},
    {"type": "object", "anyOf": [{"required": ["name"]}, {"required": ["age"]}]},
    {"type": "integer", "allOf": [{"minimum": 3}, {"maximum": 40}]},
    {"type": ["string", "integer"], "minimum": 3, "maximum": 99, "maxLength": 5},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3, "uniqueItems": True},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 3, "contains": {"const": 7}},
    {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "maxProperties": 2},
    {"type": "string", "not": {"const": "x"}, "maxLength": 5},
    {"type": "integer", "if": {"minimum": 5}, "then": {"maximum": 9}},
    {"oneOf": [{"type": "integer"}, {"type": "number", "maximum": 3}]},
)
"""Keywords that not every grammar can express, and some that all can."""


def random_schema(seed: int) -> Schema:
    """The same for the same seed."""
    return _Maker(Random(seed)).schema()


def fate(schema: Schema, reason: str, text: str) -> Fate:
    """The outcome for a reply that ended for ``reason``. A format is an annotation, JSON Schema's default."""
    if reason == "length":
        return "cut off"
    try:
        value = _value(text)
    except ValueError:
        return "invalid"
    return "valid" if jsonschema_rs.validator_for(schema).is_valid(value) else "invalid"


def follows_formats(schema: Schema, text: str) -> bool:
    """Whether a valid text also has the formats of the schema, as the validator checks them."""
    return jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(_value(text))


def _value(text: str) -> JsonValue:
    """Handles numbers that may be too large for a float."""
    return json.loads(text, parse_float=Decimal)


@final
class _Maker:
    def __init__(self, random: Random) -> None:
        self._random = random
        self._definitions: Schema = {}

    def schema(self) -> Schema:
        if self._random.random() < 0.3:
            self._definitions["tree"] = self._tree()
        if self._random.random() < 0.4:
            self._definitions["part"] = self._any(_DEPTH - 1)
        schema = self._object(0) if self._random.random() < 0.7 else self._any(0)
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _any(self, depth: int) -> Schema:
        leaves: list[Callable[[], Schema]] = [self._integer, self._number, self._string, self._enum, self._plain]
        if self._definitions and depth:
            leaves.append(self._ref)
        nested = [self._object, self._object, self._array, self._union]
        if depth < _DEPTH and self._random.random() < 0.5:
            return self._random.choice(nested)(depth)
        if self._random.random() < 0.04:
            return self._random.choice(_RARE)
        return self._random.choice(leaves)()

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(_WORDS, self._random.randint(0, 4))
        properties: Schema = {name: self._any(depth + 1) for name in names}
        schema: Schema = {"type": "object", "properties": properties}
        if required := [name for name in names if self._random.random() < 0.7]:
            schema["required"] = list(required)
        if self._random.random() < 0.8:
            schema["additionalProperties"] = False
        elif self._random.random() < 0.5:
            schema["additionalProperties"] = self._integer()
        return schema

    def _array(self, depth: int) -> Schema:
        least = self._random.randint(0, 2)
        schema: Schema = {
            "type": "array",
            "items": self._any(depth + 1),
            "maxItems": least + self._random.randint(0, 3),
        }
        if least:
            schema["minItems"] = least
        if self._random.random() < 0.2:
            schema["prefixItems"] = [self._any(depth + 1)]
        return schema

    def _union(self, depth: int) -> Schema:
        match self._random.randrange(4):
            case 0:  # of kinds that no value is both of
                return {"oneOf": [self._integer(), self._text(), self._object(depth + 1)]}
            case 1:
                return {"anyOf": [self._any(depth + 1), {"type": "null"}]}
            case 2:
                return {"allOf": [self._object(depth + 1), {"type": "object"}]}
            case _:
                return {"anyOf": [self._any(depth + 1) for _ in range(self._random.randint(2, 3))]}

    def _ref(self) -> Schema:
        return {"$ref": f"#/$defs/{self._random.choice(sorted(self._definitions))}"}

    def _tree(self) -> Schema:
        children: Schema = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}
        return {
            "type": "object",
            "properties": {"here": self._integer(), "children": children},
            "required": ["here"],
            "additionalProperties": False,
        }

    def _integer(self) -> Schema:
        schema: Schema = {"type": "integer"}
        low = self._random.choice([-1000, -7, 0, 1, 10, 1 << 40])
        for key, value in (("minimum", low), ("maximum", low + self._random.choice([0, 5, 99, 12345]))):
            if self._random.random() < 0.7:
                schema[key] = value
        if self._random.random() < 0.15:
            schema["multipleOf"] = self._random.choice([1, 2, 5])
            schema.pop("maximum", None)
        return schema

    def _number(self) -> Schema:
        schema: Schema = {"type": "number"}
        low = self._random.choice([-2.5, 0, 0.001, 3])
        if self._random.random() < 0.8:
            schema[self._random.choice(["minimum", "exclusiveMinimum"])] = low
        if self._random.random() < 0.8:
            schema[self._random.choice(["maximum", "exclusiveMaximum"])] = low + self._random.choice([0.5, 1, 250.25])
        return schema

    def _string(self) -> Schema:
        match self._random.randrange(3):
            case 0:
                return {"type": "string", "pattern": self._random.choice(_PATTERNS)}
            case 1:
                return {"type": "string", "format": self._random.choice(_FORMATS)}
            case _:
                return self._text()

    def _text(self) -> Schema:
        schema: Schema = {"type": "string", "maxLength": self._random.randint(1, 20)}
        if self._random.random() < 0.3:
            schema["minLength"] = 1
        return schema

    def _enum(self) -> Schema:
        values: list[JsonValue] = [
            "red",
            "größe",
            '"',
            "",
            0,
            -1.5,
            10**12,
            True,
            None,
            [],
            [1, "x"],
            {"a": {"b": None}},
        ]
        if self._random.random() < 0.3:
            return {"const": self._random.choice(values)}
        return {"enum": self._random.sample(values, self._random.randint(1, 5))}

    def _plain(self) -> Schema:
        kind = self._random.choice(["boolean", "null", "integer"])
        return {"type": [kind, "null"]} if kind != "null" and self._random.random() < 0.4 else {"type": kind}
