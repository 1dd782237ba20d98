"""Rewrites conditions in a JSON Schema to alternatives, which grammars can enforce."""

from typing import cast

from pydantic import JsonValue

from exo.worker.runner_common.grammar.schema_overlap import Schema

_MOST_CONDITIONS = 6
"""The most conditions of one schema. A grammar has an alternative for each combination of their outcomes."""
_OTHER_TYPES = ("null", "boolean", "object", "array", "number", "string")
_NOTES = {"title", "description", "$comment", "default", "examples"}


def rewrite_conditions(made: Schema) -> None:
    """Rewrites ``not``, ``if`` and dependencies to ``anyOf`` within ``allOf``. Leaves what it cannot express.

    A condition can be expressed if its opposite can: by types, by the absence of properties, and by the remaining
    values of an ``enum`` in the same place.
    """
    found: list[JsonValue] = []
    left = dict(made)
    negated = _opposite(left.pop("not", False), made)
    if negated is None:
        left["not"] = made["not"]
    elif negated is not True:
        found.append(negated)
    if "if" in left and (otherwise := _opposite(left["if"], made)) is not None:
        ways: list[JsonValue] = [
            {"allOf": [left.pop("if"), left.pop("then", True)]},
            {"allOf": [otherwise, left.pop("else", True)]},
        ]
        found.append({"anyOf": ways})
    for keyword in ("dependencies", "dependentRequired", "dependentSchemas"):
        if isinstance(named := left.get(keyword), dict):
            del left[keyword]
            found += [_dependency(name, needed) for name, needed in named.items() if needed not in ([], True)]
    if found and len(found) <= _MOST_CONDITIONS:
        made.clear()
        made.update(left)
        both = made.get("allOf")
        made["allOf"] = [*(both if isinstance(both, list) else []), *found]


def _dependency(name: str, needed: JsonValue) -> Schema:
    """A schema of values without the property ``name``, or with the properties or of the schema ``needed``."""
    # Grammars fix the order of properties: the one that needs others comes first, unless the schema has its own order.
    named: Schema = {"properties": {name: True}, "required": needed}
    return {"anyOf": [{"properties": {name: False}}, named if isinstance(needed, list) else needed]}


def _opposite(schema: JsonValue, beside: JsonValue) -> JsonValue:
    """Returns a schema of the values that ``schema`` does not match, or None if it cannot be written.

    ``beside`` is a schema that all values match.
    """
    if isinstance(schema, bool):
        return not schema
    if not isinstance(schema, dict):
        return None
    ways: list[JsonValue] = []
    for keyword, value in schema.items():
        if keyword in _NOTES:
            continue
        way = _fails(keyword, value, beside)
        if way is None:
            return None
        ways.append(way)
    return ways[0] if len(ways) == 1 else {"anyOf": ways} if ways else False


def _fails(keyword: str, value: JsonValue, beside: JsonValue) -> JsonValue:
    """Returns a schema of the values that do not match one keyword, or None if it cannot be written."""
    match keyword, value:
        case "type", _:
            return _other_types(value)
        case "required", list() if value:
            absent: list[JsonValue] = [{"properties": {name: False}} for name in cast(list[str], value)]
            return {"type": "object", "anyOf": absent}
        case "properties", dict() if value:
            given = beside.get("properties") if isinstance(beside, dict) else None
            known: Schema = given if isinstance(given, dict) else {}
            wrong = {name: _opposite(each, known.get(name)) for name, each in value.items()}
            if None in wrong.values():
                return None
            return {
                "type": "object",
                "anyOf": [{"required": [name], "properties": {name: each}} for name, each in wrong.items()],
            }
        case "const" | "enum", _:
            known_values = _values(beside)
            excluded = value if keyword == "enum" and isinstance(value, list) else [value]
            if known_values is None:
                return None
            rest = [each for each in known_values if not any(_equal(each, other) for other in excluded)]
            return {"enum": rest} if rest else False
        case "anyOf", list() if value:
            opposites = [_opposite(each, beside) for each in value]
            return None if None in opposites else {"allOf": opposites}
        case "not", _:
            return value
        case _:
            return None


def _other_types(kinds: JsonValue) -> JsonValue:
    excluded = kinds if isinstance(kinds, list) else [kinds]
    if "integer" in excluded and "number" not in excluded:
        return None
    others = cast(list[JsonValue], [kind for kind in _OTHER_TYPES if kind not in excluded])
    return {"type": others} if others else False


def _values(schema: JsonValue) -> list[JsonValue] | None:
    """Returns all values that a schema can match, if it lists them."""
    if not isinstance(schema, dict):
        return None
    if isinstance(listed := schema.get("enum"), list):
        return listed
    return [True, False] if schema.get("type") == "boolean" else None


def _equal(one: JsonValue, other: JsonValue) -> bool:
    """Equality by which 1 differs from true."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other
