"""Requests made from an OpenAPI document: values that it accepts, and the same with faults."""

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from hypothesis import strategies as st
from pydantic import JsonValue

Json = st.SearchStrategy[JsonValue]

_TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
_SCALARS: Json = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(), _TEXT, st.just(""))
ANYTHING: Json = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3), max_leaves=6
)


def accepted(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Json:
    """Values that ``schema`` accepts; ``schemas`` are the document's, by name. Lists have up to four items."""
    if "$ref" in schema:
        return accepted(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if "anyOf" in schema:
        return st.one_of([accepted(each, schemas) for each in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(cast(list[JsonValue], schema.get("enum") or [schema["const"]]))
    made: Mapping[str, Callable[[], Json]] = {
        "string": lambda: _string(schema),
        "integer": lambda: st.integers(schema.get("minimum"), _largest(schema)),
        "number": lambda: _number(schema),
        "boolean": st.booleans,
        "null": st.none,
        "array": lambda: cast(
            Json, st.lists(accepted(schema["items"], schemas), min_size=schema.get("minItems", 0), max_size=4)
        ),
        "object": lambda: _object(schema, schemas),
    }
    return made[schema["type"]]() if "type" in schema else ANYTHING


def _largest(schema: Mapping[str, Any]) -> int | None:
    return schema["exclusiveMaximum"] - 1 if "exclusiveMaximum" in schema else schema.get("maximum")


def _number(schema: Mapping[str, Any]) -> Json:
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    return st.floats(low, high, exclude_min="exclusiveMinimum" in schema, allow_nan=False, allow_infinity=False)


def _string(schema: Mapping[str, Any]) -> st.SearchStrategy[str]:
    if "pattern" in schema:
        return _matching(schema["pattern"])
    return st.text(
        st.characters(codec="utf-8"), min_size=schema.get("minLength", 0), max_size=min(schema.get("maxLength", 30), 30)
    )


def _matching(pattern: str) -> st.SearchStrategy[str]:
    return st.from_regex(re.compile(pattern), fullmatch=True)


def _object(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Json:
    fields = {name: accepted(each, schemas) for name, each in schema.get("properties", {}).items()}
    if not fields:
        names = _string(schema.get("propertyNames", {}))
        values = schema.get("additionalProperties", True)
        inner = accepted(cast(dict[str, Any], values), schemas) if isinstance(values, dict) else ANYTHING
        for pattern, each in schema.get("patternProperties", {}).items():
            names, inner = _matching(pattern), accepted(each, schemas)
        return cast(Json, st.dictionaries(names, inner, max_size=4))
    required = {name: fields.pop(name) for name in schema.get("required", ())}
    return cast(Json, st.fixed_dictionaries(required, optional=fields))


@st.composite
def spoiled(draw: st.DrawFn, sound: Json) -> JsonValue:
    """A valid value in which up to three places are changed, missing or new."""
    value = draw(sound)
    for _ in range(draw(st.integers(0, 3))):
        value = _spoil(draw, value)
    return value


def _spoil(draw: st.DrawFn, value: JsonValue) -> JsonValue:
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        name = draw(st.sampled_from(sorted(value)))
        match draw(st.integers(0, 5)):
            case 0:
                return {key: each for key, each in value.items() if key != name}
            case 1:
                return {**value, draw(_TEXT): draw(ANYTHING)}
            case _:
                return {**value, name: _spoil(draw, value[name])}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _spoil(draw, value[at]), *value[at + 1 :]]
    return draw(ANYTHING)
