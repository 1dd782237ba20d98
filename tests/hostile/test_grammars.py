"""Hostile grammars over HTTP (row 6 of the table of hostile inputs): a 400 that names the client's field, or a reply.

Whatever is sent, afterwards the same runner answers.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import JsonValue

from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.tool_template import TEMPLATE

MESSAGES: list[JsonValue] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_gguf(home / "good.gguf", Shape(scale=0.5))
    table: dict[str, JsonValue] = {"path": str(home / "good.gguf"), "slots": 2, "n_ctx": 1024, "threads": 1}
    write_card(home, "good", {"cuda": {**table, "chat_template": TEMPLATE}}, backends=["LlamaCppCpu"])
    with ServeProgram(home, "--load", "good") as server:
        yield server


@pytest.fixture
def server(program: ServeProgram) -> Iterator[ServeProgram]:
    """The server, which after each test must be as well as before, and its runner the same one."""
    assert program.complete("good", max_tokens=1).status_code == 200
    before = [runner.pid for runner in program.runners()]
    yield program
    assert program.client.get("/health").json() == {"status": "ok"}
    usual = program.complete("good", structured_outputs={"choice": ["yes"]})
    assert usual.json()["choices"][0]["text"] == "yes"
    assert [runner.pid for runner in program.runners()] == before


def nested(depth: int, **within: JsonValue) -> JsonValue:
    schema: JsonValue = within or {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    return schema


def doubled(times: int) -> JsonValue:
    """Of as many values as 2 to the power of ``times``, all of which must be there."""

    def twice(of: int) -> JsonValue:
        both: list[JsonValue] = [{"$ref": f"#/$defs/d{of}"}] * 2
        return {"type": "array", "prefixItems": both, "minItems": 2}

    pairs = {f"d{number}": twice(number + 1) for number in range(times)}
    return {"$ref": "#/$defs/d0", "$defs": {**pairs, f"d{times}": {"type": "null"}}}


def any_of(*schemas: JsonValue) -> JsonValue:
    return {"anyOf": [*schemas]}


NULL: JsonValue = {"type": "null"}
TREE: JsonValue = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "minItems": 1}
SCHEMAS: dict[str, JsonValue] = {
    "unknown type": {"type": "strange"},
    "no type": {"type": 7},
    "nothing matches": {"type": "integer", "minimum": 3, "maximum": 2},
    "nothing at all": {"not": {}},
    "empty enum": {"enum": []},
    "contradiction": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "itself": {"$ref": "#"},
    "each other": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "endless tree": {"$ref": "#/$defs/tree", "$defs": {"tree": TREE}},
    "lost ref": {"$ref": "#/$defs/nowhere"},
    "remote ref": {"$ref": "http://127.0.0.1:1/schema.json"},
    "metadata ref": {"$ref": "http://169.254.169.254/latest"},
    "file ref": {"$ref": "file:///etc/passwd"},
    "remote id": {"$id": "http://127.0.0.1:1/", "$ref": "other"},
    "deep": nested(120),
    "doubled": doubled(60),
    "huge enum": {"enum": [f"value {number}" for number in range(50_000)]},
    "many properties": {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(20_000)}},
    "all required": {"type": "object", "required": [f"p{number}" for number in range(5000)]},
    "a megabyte": {"description": "x" * (1 << 20)},
    "a megabyte of name": {"type": "object", "properties": {"x" * (1 << 20): {"type": "null"}}},
    "many items": {"type": "array", "items": {"type": "null"}, "minItems": 10**9},
    "long string": {"type": "string", "minLength": 10**9},
    "long string at most": {"type": "string", "maxLength": 10**9},
    "large number": {"type": "integer", "minimum": 10**300},
    "large bounds": {"type": "number", "exclusiveMinimum": 10**400, "maximum": 0.5},
    "bounds that are none": {"type": "number", "exclusiveMinimum": True, "maximum": "0.5", "exclusiveMaximum": None},
    "small steps": {"type": "number", "multipleOf": 1e-300},
    "steps of nothing": {"type": "number", "multipleOf": 0},
    "bad pattern": {"type": "string", "pattern": "("},
    "looks around": {"type": "string", "pattern": "(?=a)b"},
    "refers back": {"type": "string", "pattern": "(a)\\1"},
    "pattern bomb": {"type": "string", "pattern": "^(a+)+$"},
    "counted bomb": {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
    "several bombs": {"type": "object", "patternProperties": {f".*{at}.*{at}.*": {"type": "null"} for at in range(50)}},
    "prototype": {"type": "object", "properties": {"__proto__": {"type": "null"}}, "required": ["__proto__"]},
    "names": {"type": "object", "required": ["", "\0", "\n", '"', "\u2028", "😀"], "additionalProperties": False},
    "guidance": {"x-guidance": {"whitespace_pattern": "("}},
    "lark inside": {"x-guidance": {"lenient": True, "coerce_one_of": 7}, "type": "string"},
    "wrong keywords": {"type": "string", "minLength": "x", "properties": 7, "items": "y"},
    "unions": any_of(*[any_of(*[NULL] * 100)] * 100),
}
REGEXES = {
    "open": "(",
    "deep": "(" * 50_000,
    "looks around": "(?<!a)b",
    "refers back": r"(a)\1",
    "bomb": "(a+)+$",
    "counted": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}",
    "large count": "a{1000000000}",
    "classes": "[" + "\\w\\d\\s" * 20_000 + "]",
    "empty": "[^\\s\\S]",
    "a megabyte": "a|" * (1 << 19),
    "too long": "a" * (1 << 21),
}
GRAMMARS = {
    "nonsense": "§%&/()=?",
    "json": '{"grammars": []}',
    "no start": 'begin: "a"',
    "itself": "start: start",
    "left": 'start: start "a" | "a"',
    "open": "start: (",
    "deep": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000,
    "undefined": "start: nope",
    "token": "start: <[999999999]>",
    "negative token": "start: <[-1]>",
    "token by name": "start: <|no_such_token|>",
    "remote": '%import "http://127.0.0.1:1/x.lark"\nstart: "a"',
    "undone": 'start: "a"\n%llguidance {"no_forcing": false, "what": 1}',
    "json inside": 'start: %json {"$ref": "file:///etc/passwd"}',
    "other grammars": "start: @other",
    "states": "start: A\nA: " + " & ".join(f"/(.*\\n)*[a-z]*x{{{count}}}[^b]*/" for count in range(1, 30)),
    "ambiguous": 'start: a a a a a a a a\na: ("a" | "a" "a" | b)*\nb: a | ""',
    "gbnf without root": 'x ::= "a"',
    "gbnf undefined": "root ::= nope",
    "gbnf deep": "root ::= " + "(" * 100_000,
    "gbnf itself": "root ::= root",
    "gbnf repeated": 'root ::= "a"{0,1000000000}',
    "gbnf long": 'root ::= "' + "a" * (1 << 20) + '"',
    "nul": "start: \0",
    "too long": 'start: "' + "a" * (1 << 21) + '"',
}


def post(server: ServeProgram, path: str, **body: object) -> httpx.Response:
    return server.client.post(path, json={"model": "good", "max_tokens": 12, **body})


def harmless(reply: httpx.Response, param: str) -> None:
    assert reply.status_code in (200, 400), (reply.status_code, reply.text[:500])
    if reply.status_code == 400:
        error = reply.json()["error"]
        assert error["param"] == param, error
        assert len(error["message"]) < 600
        assert "\n" not in error["message"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema(server: ServeProgram, name: str) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[name]}}
    reply = post(server, "/v1/chat/completions", messages=MESSAGES, response_format=schema)
    harmless(reply, "response_format.json_schema.schema")


@pytest.mark.parametrize("name", REGEXES)
def test_a_regex(server: ServeProgram, name: str) -> None:
    reply = post(server, "/v1/completions", prompt="x", structured_outputs={"regex": REGEXES[name]})
    harmless(reply, "structured_outputs.regex")


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_grammar(server: ServeProgram, name: str) -> None:
    harmless(post(server, "/v1/completions", prompt="x", grammar=GRAMMARS[name]), "grammar")


@pytest.mark.parametrize("name", ["unknown type", "file ref", "bad pattern", "nothing matches"])
def test_every_dialect_calls_its_field_by_its_own_name(server: ServeProgram, name: str) -> None:
    schema: Any = SCHEMAS[name]
    chat: dict[str, Any] = {"messages": MESSAGES}
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}, "required": ["a"]}}
    named: list[tuple[str, dict[str, Any], str]] = [
        (
            "/v1/responses",
            {"input": "hi", "text": {"format": {"type": "json_schema", "schema": schema}}},
            "text.format",
        ),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"json": schema}}, "structured_outputs.json"),
        ("/v1/messages", {**chat, "output_config": {"format": {"type": "json_schema", "schema": schema}}}, "schema"),
        ("/api/chat", {**chat, "format": schema}, "format"),
        ("/api/generate", {"prompt": "x", "format": schema}, "format"),
        (
            "/v1/chat/completions",
            {**chat, "tools": [{"type": "function", "function": tool}], "tool_choice": "required"},
            "tool_choice",
        ),
    ]
    for path, body, field in named:
        limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        fields = body if path.startswith("/api") else {**body, limit: 12}
        reply = server.client.post(path, json={"model": "good", **fields})
        assert reply.status_code == 400, (path, reply.text[:500])
        error = reply.json()["error"]
        message = error if isinstance(error, str) else error["message"]
        assert field in message.partition(": ")[0], (path, message)


def test_the_message_says_what_is_wrong(server: ServeProgram) -> None:
    def message(**fields: object) -> str:
        return post(server, "/v1/completions", prompt="x", **fields).json()["error"]["message"]

    assert "strange" in message(structured_outputs={"json": SCHEMAS["unknown type"]})
    assert "file:///etc/passwd" in message(structured_outputs={"json": SCHEMAS["file ref"]})
    assert "root" in message(grammar=GRAMMARS["gbnf without root"])
    assert re.search("look-?around", message(structured_outputs={"regex": REGEXES["looks around"]}))


def test_text_of_a_schema_may_be_deeper_than_a_body(server: ServeProgram) -> None:
    text = '{"items":' * 100_000 + "{}" + "}" * 100_000
    reply = post(server, "/v1/completions", prompt="x", structured_outputs={"json": text})
    assert reply.status_code == 400
    harmless(reply, "structured_outputs.json")


def test_arguments_that_are_no_object_are_refused(server: ServeProgram) -> None:
    schema = SCHEMAS["unknown type"]
    chat: dict[str, Any] = {"messages": MESSAGES}
    openai: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    named: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/chat/completions", {**chat, "tools": openai}, "tools.0.function.parameters.type"),
        ("/v1/responses", {"input": "x", "tools": [{**openai[0]["function"], "type": "function"}]}, "tools.0.param"),
        ("/v1/messages", {**chat, "max_tokens": 1, "tools": [{"name": "f", "input_schema": schema}]}, "tools.0.input_"),
        ("/api/chat", {**chat, "tools": openai}, "tools.0.function.parameters.type"),
    ]
    for path, body, field in named:
        reply = server.client.post(path, json={"model": "good", **body})
        assert reply.status_code == 400, (path, reply.text)
        assert field in reply.text, (path, reply.text)


def test_a_schema_that_only_looks_hostile_is_followed(server: ServeProgram) -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": {**_object("__proto__"), "additionalProperties": False}}}
    reply = post(server, "/v1/chat/completions", messages=MESSAGES, response_format=schema, max_tokens=200)
    assert json.loads(reply.json()["choices"][0]["message"]["content"]) == {"__proto__": None}


def _object(name: str) -> dict[str, JsonValue]:
    return {"type": "object", "properties": {name: {"type": "null"}}, "required": [name]}
