"""What of a JSON Schema is refused, and where."""

import pytest
from pydantic import JsonValue

from exo.worker.runner_common.grammar.json_schema import enforced
from exo.worker.runner_common.grammar.schema_keywords import SchemaError

Schema = dict[str, JsonValue]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"properties": {"a": {"not": {"minLength": 2}}}}, "properties.a.not: this keyword cannot be enforced here"),
        ({"properties": {"a": {"not": {"type": "integer"}}}}, "properties.a.not: this keyword cannot be enforced here"),
        ({"if": {"pattern": "^a"}, "then": {"minLength": 2}}, "if: this keyword"),
        ({"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}}, "if: this keyword"),
        ({"items": {"contains": {"const": 1}}}, "items.contains: this keyword"),
        ({"dependentRequired": {str(at): ["b"] for at in range(7)}}, "dependentRequired: this keyword"),
        ({"properties": {"a": {"type": "any"}}}, "properties.a.type: 'any' is not a type; accepted are null, boolean"),
        ({"type": "array", "minItems": -1}, "minItems: must be a whole number, 0 or more (got -1)"),
        ({"type": "string", "pattern": r"^a(?=b)"}, "pattern: '^a(?=b)' has look-around"),
        ({"enum": []}, "enum: is empty"),
        (
            {"properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"properties": {"y": {"not": {"const": 1}}}}}},
            "$defs.a.properties.y.not: this keyword",
        ),
        (
            {
                "anyOf": [{"$ref": "#/definitions/a"}],
                "definitions": {
                    "a": {"items": {"$ref": "#/definitions/b"}},
                    "b": {"contains": {"const": 1}},
                    "c": {"if": {}, "then": {}},
                },
            },
            "definitions.b.contains: this keyword",
        ),
        ({"items": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "any"}}}, "$defs.a.type: 'any' is not a type"),
        ({"$ref": "#/$defs/a", "$defs": {"a": 3}}, "$defs.a: a JSON Schema must be"),
        ({"properties": {"a": 3}}, "properties.a: a JSON Schema must be an object, true or false"),
    ],
)
def test_what_cannot_be_enforced_is_refused_at_its_place(schema: Schema, reason: str) -> None:
    with pytest.raises(SchemaError) as refused:
        enforced(schema)
    assert str(refused.value).startswith(reason)
