"""JSON Schemas as generators write them: what is enforced, what is noted, what is refused."""

import json
from collections.abc import Iterator

import jsonschema_rs
import pytest
from pydantic import JsonValue

from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.registry import FORMATS
from exo.worker.protocol.commands import Grammar
from exo.worker.runner_common.grammar.grammar_errors import named
from exo.worker.runner_common.grammar.guided_decoding import GrammarCompiler, GrammarError
from exo.worker.runner_common.grammar.json_schema import enforced

END = 256
Schema = dict[str, JsonValue]


@pytest.fixture(scope="module")
def constraints() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(
        lambda token: bytes([token]) if token < END else b"<end>", lambda token: token == END, (END,), END + 1
    )
    yield made
    made.close()


def writes(constraints: GrammarCompiler, schema: JsonValue, value: JsonValue) -> bool:
    constraint = constraints.compile(Grammar(syntax="json_schema", source=json.dumps(schema)))
    try:
        for byte in json.dumps(value, ensure_ascii=False).encode():
            constraint.accept(byte)
        return constraint.finished or bool(constraint.mask()[END])
    except GrammarError:
        return False


def notes(schema: JsonValue) -> list[str]:
    return [note.where for note in enforced(schema).notes]


UNKNOWN = [
    *("path", "binary", "password", "base64", "base64url", "ipv4network", "ipv6interface", "multi-host-uri", "json"),
    *("cuid", "cuid2", "ulid", "nanoid", "emoji", "jwt", "xid", "ksuid", "cidrv4", "e164", "lowercase"),
    *("byte", "url", "decimal", "int32", "int64", "float", "double", "regex", "uri-reference", "iri", "unknown", ""),
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_format_is_an_annotation(constraints: GrammarCompiler, name: str) -> None:
    schemas: list[Schema] = [
        {"type": "string", "format": name},
        {"format": name},
        {"type": ["string", "null"], "format": name},
    ]
    for schema in schemas:
        assert writes(constraints, schema, "any text")
        assert notes(schema) == ["format"]


ANNOTATIONS: Schema = {
    "title": "T",
    "description": "d",
    "default": 3,
    "examples": [1],
    "example": 1,
    "deprecated": True,
    "readOnly": True,
    "discriminator": {"propertyName": "k"},
    "$id": "Thing",
    "$comment": "c",
    "nullable": False,
    "strict": True,
    "xml": {},
    "externalDocs": {},
    "contentEncoding": "base64",
    "contentMediaType": "application/json",
    "contentSchema": {"type": "object"},
    "x-order": 1,
    "propertyNames": {"type": "string"},
    "uniqueItems": False,
    "not": {"not": {}},
    "then": False,
    "dependentRequired": {},
    "unevaluatedItems": True,
    "minContains": 2,
    "$dynamicAnchor": "node",
    "enum": ["a", "b"],
    "format": None,
    "minLength": 1.0,
}


@pytest.mark.parametrize(
    "dialect", ["http://spec.openapis.org/oas/3.1/dialect/base", "https://json-schema.org/draft-07/schema#"]
)
def test_what_restricts_nothing_is_accepted_without_a_note(constraints: GrammarCompiler, dialect: str) -> None:
    schema = {**ANNOTATIONS, "$schema": dialect}
    assert notes(schema) == []
    assert writes(constraints, schema, "a")
    assert not writes(constraints, schema, "c")


@pytest.mark.parametrize(
    ("schema", "note"),
    [
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "object", "required": ["a"]}, {"type": "object", "required": ["b"]}]}, "oneOf"),
        ({"properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}, "properties.a.oneOf"),
        ({"type": "object", "propertyNames": {"format": "date"}}, "propertyNames.format"),
        ({"type": "number", "minimum": -3.4028234663852886e38}, "minimum"),
        ({"type": "integer", "maximum": (1 << 63) - 1}, "maximum"),
    ],
)
def test_what_is_not_enforced_is_noted(constraints: GrammarCompiler, schema: Schema, note: str) -> None:
    assert notes(schema) == [note]
    assert constraints.compile(Grammar(syntax="json_schema", source=json.dumps(schema)))


SAMPLES: list[JsonValue] = [
    *(None, True, 0, 1, 2.5, -3, "", "a", "ab", "abc", "a.b@c.de", ".a@c.de", "a..b@c.de", "Passw0rd", "password"),
    *([], [True], [True, True], [True, False], ["a"], ["a", "b"], ["a", "a"], ["a", 1], [1, "a"]),
    *({}, {"a": 1}, {"b": 1}, {"a": "x"}, {"ab": 1}, {"a": 1, "b": 1}, {"k": "a"}, {"k": "b", "x": 1}, {"k": "b"}),
]
_A: Schema = {"type": "object", "properties": {"k": {"enum": ["a", "b"]}, "x": {"type": "integer"}}}
EXACT: list[Schema] = [
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"dependentRequired": {"a": ["b"], "b": ["a"]}},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "dependentSchemas": {"b": {"required": ["a"]}}},
    {"type": "object", "dependencies": {"a": ["b"], "k": {"properties": {"x": False}}}},
    {"not": {"type": "string"}},
    {"not": {"type": ["number", "integer", "object"]}},
    {"not": {"required": ["a"]}},
    {"type": "object", "not": {"required": ["a", "b"]}},
    {"type": "object", "not": {"anyOf": [{"required": ["a"]}, {"required": ["k"]}]}},
    {"enum": ["a", 1, True], "not": {"const": 1}},
    {"type": "boolean", "not": {"enum": [True]}},
    {"if": {"type": "string"}, "then": {"minLength": 2}, "else": {"type": "array"}},
    {"if": {"type": "object"}, "then": {"required": ["a"]}},
    {**_A, "if": {"properties": {"k": {"const": "b"}}, "required": ["k"]}, "then": {"required": ["x"]}},
    {**_A, "if": {"properties": {"k": {"const": "a"}}}, "then": {"required": ["k"]}, "else": {"required": ["x"]}},
    {**_A, "allOf": [{"not": {"required": ["k", "x"]}}]},
    {"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": {"type": "integer"}},
    {"type": "object", "propertyNames": {"$ref": "#/$defs/n"}, "$defs": {"n": {"type": "string", "enum": ["a", "b"]}}},
    {"type": "object", "propertyNames": {"minLength": 2}},
    {"type": "object", "propertyNames": {"maxLength": 1}, "additionalProperties": {"type": "string"}},
    {"type": "object", "propertyNames": {"type": "string", "pattern": "^a+$"}},
    {"type": "object", "properties": {"a": {"not": {}}}},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "unevaluatedProperties": False},
    {"type": "array", "prefixItems": [{"type": "string"}], "unevaluatedItems": False},
    {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True},
    {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True, "minItems": 1},
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "maxItems": 1},
    {"oneOf": [{"type": "string"}, {"type": "integer"}, {"type": "array", "maxItems": 1}]},
    {"oneOf": [{"const": "a"}, {"enum": ["ab", 1]}, {"type": "null"}]},
    {
        "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        "$defs": {
            "a": {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]},
            "b": {"type": "object", "properties": {"k": {"const": "b"}, "x": {}}, "required": ["k", "x"]},
        },
    },
    {"anyOf": [{"type": "string"}, {"type": "integer"}], "oneOf": [{"const": 1}, {"const": "a"}]},
    {"type": "string", "pattern": r"^(?!\.)(?!.*\.\.)([a-z\.]*)[a-z]@([a-z]+\.)+[a-z]{2,}$"},
    {"type": "string", "pattern": r"^(?=.*\d)(?=.*[A-Z]).{8,}$"},
    {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}]},
]


@pytest.mark.parametrize("schema", EXACT)
def test_what_is_not_noted_is_enforced(constraints: GrammarCompiler, schema: Schema) -> None:
    assert notes(schema) == []
    valid = jsonschema_rs.validator_for(schema)
    told = [(value, writes(constraints, schema, value)) for value in SAMPLES]
    assert told == [(value, valid.is_valid(value)) for value in SAMPLES]


def test_a_definition_that_nothing_refers_to_may_say_anything(constraints: GrammarCompiler) -> None:
    unused: Schema = {"a": {"not": {"type": "null"}}, "b": {"$ref": "#/$defs/a"}, "c": {"type": "integer"}, "d": None}
    schema: Schema = {"properties": {"$defs": {"$ref": "#/$defs/c"}}, "default": {"$ref": "#/$defs/a"}, "$defs": unused}
    assert writes(constraints, schema, {"$defs": 1})
    assert not writes(constraints, schema, {"$defs": "a"})


NULLABLE: list[Schema] = [
    {"type": "string"},
    {"type": "string", "enum": ["a", "ab"]},
    {"const": "a"},
    {"type": "string", "minLength": 2, "pattern": "^a"},
    {"type": "integer", "minimum": 1},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True, "minItems": 1},
    {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "string", "maxLength": 1}}},
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string", "maxLength": 1}}},
    {"oneOf": [{"type": "string"}, {"type": "array", "maxItems": 1}]},
    {"anyOf": [{"type": "string"}, {"type": "null"}]},
    {"type": ["string", "null"], "enum": ["a"]},
    {"minLength": 2},
]


@pytest.mark.parametrize("schema", NULLABLE)
def test_null_matches_what_is_nullable_and_nothing_else_does_besides(
    constraints: GrammarCompiler, schema: Schema
) -> None:
    valid = jsonschema_rs.validator_for(schema)
    expected = [(value, value is None or valid.is_valid(value)) for value in SAMPLES]
    nullable: Schema = {**schema, "nullable": True}
    assert notes(nullable) == []
    assert [(value, writes(constraints, nullable, value)) for value in SAMPLES] == expected
    definitions = {key: each for key, each in schema.items() if key == "$defs"}
    inside: Schema = {"type": "object", "properties": {"k": nullable}, "required": ["k"], **definitions}
    assert [(value, writes(constraints, inside, {"k": value})) for value in SAMPLES] == expected
    assert enforced(enforced(inside).schema) == enforced(inside), "the server and the runner each rewrite it"
    assert writes(constraints, {**schema, "nullable": False}, None) == valid.is_valid(None)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "pattern": "("}, "the pattern '(' cannot be used: unclosed group"),
        ({"$ref": "#/$defs/none"}, "$ref: '#/$defs/none' is not in the schema"),
        ({"$ref": "http://x.y/z"}, "$ref: 'http://x.y/z' is another document"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"not": {"minItems": 1}}}}, "$defs.a.not: this keyword cannot be"),
        ({"type": "object", "minProperties": 1, "properties": {"a": {}}}, "minProperties and maxProperties can be"),
        ({"patternProperties": {"a": {}, "b": {}}}, "the patternProperties 'a' and 'b' overlap"),
        ({"type": "string", "pattern": "^a", "format": "date"}, "nothing matches the schema"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "the required property 'a'"),
        ({"x-guidance": {"wat": 1}}, "x-guidance: there is no option 'wat'"),
    ],
)
def test_the_compilers_findings_are_told_in_our_words(
    constraints: GrammarCompiler, schema: Schema, reason: str
) -> None:
    with pytest.raises(GrammarError) as refused:
        constraints.compile(Grammar(syntax="json_schema", source=json.dumps(schema)))
    assert reason in str(refused.value)


@pytest.mark.parametrize("form", ["hermes", "glm", "kimi", "mistral"])
def test_a_finding_names_the_tool(constraints: GrammarCompiler, form: str) -> None:
    good: Schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    wrong = named({"type": "string", "pattern": "("}, "tool 'bad', property 'x'")
    bad = named({"type": "object", "properties": {"x": wrong}}, "tool 'bad'")
    tools = [Tool("good", "", good), Tool("bad", "", bad)]
    source = FORMATS[form].call_grammar(tools, parallel=True, special_tokens={})
    with pytest.raises(GrammarError, match=r"^tool 'bad'.*: the pattern '\(' cannot be used"):
        constraints.compile(Grammar(syntax="lark", source=source))
