"""Arguments written as bare text: where the tool's schema accepts a string, "7" is one."""

import json

import pytest
from pydantic import JsonValue

from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.arguments import argument_names, argument_schema, fields, to_json

DEFS: dict[str, JsonValue] = {
    "Text": {"type": "string"},
    "Also": {"$ref": "#/$defs/Text"},
    "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "integer"}]},
    "Unit": {"enum": ["7", "auto"]},
}


def parameters(schema: JsonValue) -> dict[str, JsonValue]:
    return {"type": "object", "properties": {"a": schema}, "$defs": DEFS}


STRING: JsonValue = {"type": "string"}
INTEGER: JsonValue = {"type": "integer"}
ACCEPTING: list[JsonValue] = [
    STRING,
    True,
    {},
    {"description": "anything"},
    {"type": ["integer", "string"]},
    {"type": ["null", "string"]},
    {"anyOf": [INTEGER, STRING]},
    {"oneOf": [STRING, {"type": "null"}]},
    {"anyOf": [{"type": "array", "items": STRING}, {"anyOf": [STRING, INTEGER]}]},
    {"$ref": "#/$defs/Text"},
    {"$ref": "#/$defs/Also", "description": "x"},
    {"anyOf": [INTEGER, {"$ref": "#/$defs/Also"}]},
    {"allOf": [{"$ref": "#/$defs/Text"}]},
    {"allOf": [{"description": "x"}, {"type": ["string", "integer"]}]},
    {"type": "string", "pattern": "^[0-9a-z]*"},
    {"type": ["string", "integer"], "maxLength": 30},
    {"anyOf": [{"type": "string", "format": "date"}, INTEGER]},
]


@pytest.mark.parametrize("schema", ACCEPTING)
@pytest.mark.parametrize("text", ["7", "-1.5e3", "true", "True", "null", "[1, 2]", '{"b": 1}', "07", "", " x ", "a\nb"])
def test_a_string_wins_wherever_the_schema_accepts_one(schema: JsonValue, text: str) -> None:
    assert json.loads(to_json(text, parameters(schema), "a")) == text


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (INTEGER, "7", 7),
        ({"type": ["integer", "null"]}, "null", None),
        ({"type": "boolean"}, "True", True),
        ({"type": "array"}, " [1, 2]\n", [1, 2]),
        ({"type": "array"}, "['a', True, None]", ["a", True, None]),
        ({"type": "object"}, "{'a': {\"b\": False,}}", {"a": {"b": False}}),
        ({"properties": {"b": INTEGER}}, '{"b": 1}', {"b": 1}),
        ({"anyOf": [INTEGER, {"type": "null"}]}, "None", None),
        ({"allOf": [STRING, INTEGER]}, "7", 7),
        ({"$ref": "#/$defs/Loop"}, "7", 7),
        ({"enum": ["7", 8]}, "7", "7"),
        ({"enum": ["7", 8]}, "8", 8),
        ({"enum": ["7", "8"]}, "9", "9"),
        ({"enum": ["auto"]}, " auto ", "auto"),
        ({"const": "7"}, "7", "7"),
        ({"const": 7}, "7", 7),
        ({"anyOf": [INTEGER, {"const": "auto"}]}, "7", 7),
        ({"anyOf": [INTEGER, {"$ref": "#/$defs/Unit"}]}, "7", "7"),
        ({"anyOf": [INTEGER, {"$ref": "#/$defs/Unit"}]}, "8", 8),
        ({"type": "string", "enum": ["a"]}, "8", "8"),
        ({"type": "string", "pattern": "a"}, '"a b"', "a b"),
        (INTEGER, "seven", "seven"),
        (False, "7", 7),
        ({"$ref": "https://example.org/x"}, "x", "x"),
    ],
)
def test_the_schema_decides(schema: JsonValue, text: str, value: JsonValue) -> None:
    assert json.loads(to_json(text, parameters(schema), "a")) == value


@pytest.mark.parametrize(
    "tool",
    [
        {"$ref": "#/$defs/Args", "$defs": {"Args": {"properties": {"a": STRING}}}},
        {"allOf": [{"properties": {"b": INTEGER}}, {"properties": {"a": STRING}}]},
        {"anyOf": [{"properties": {"a": INTEGER}}, {"properties": {"a": STRING}}]},
        {"properties": {"b": INTEGER}, "additionalProperties": STRING},
    ],
)
def test_the_argument_may_be_described_anywhere(tool: dict[str, JsonValue]) -> None:
    assert to_json("7", tool, "a") == '"7"'


def test_an_argument_that_nothing_describes_is_read_as_it_looks() -> None:
    assert argument_schema({"properties": {"b": INTEGER}}, "a") is None
    assert to_json("7", {}, "a") == "7"
    assert to_json("seven", {}, "a") == '"seven"'


def test_the_names_of_arguments_are_known_unless_any_is_allowed() -> None:
    assert argument_names(parameters(STRING)) == {"a"}
    assert argument_names({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}) == {"a", "b"}
    assert argument_names({"properties": {"a": {}}, "additionalProperties": True}) is None
    assert argument_names({}) is None


@pytest.mark.parametrize("schema", ACCEPTING)
def test_what_is_read_as_it_stands_is_written_as_it_stands(schema: JsonValue) -> None:
    (field,) = fields(Tool("f", "", parameters(schema)))
    assert field.is_text == (json.loads(to_json('"x"', parameters(schema), "a")) == '"x"')


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'k': 'it\\'s', 'n': [1, {'z': None}], 'b': True}", {"k": "it's", "n": [1, {"z": None}], "b": True}),
        ("(1, -2.5)", [1, -2.5]),
        ('{"a": False}', {"a": False}),
        ("{'a': 1}, {'b': 2}", "{'a': 1}, {'b': 2}"),
        ("{'a': }", "{'a': }"),
        ("{'a'", "{'a'"),
        ("nothing", "nothing"),
    ],
)
def test_objects_as_python_writes_them_are_objects_where_no_text_can_be(text: str, value: JsonValue) -> None:
    schema: dict[str, JsonValue] = {"type": ["object", "array"]}
    assert json.loads(to_json(text, parameters(schema), "a")) == value
    assert json.loads(to_json(text, parameters({"type": ["object", "string"]}), "a")) == text
