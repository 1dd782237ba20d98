"""A schema's keywords in every dialect: what has no effect is told, what cannot be enforced is refused by name."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo.api.http.middleware import WARNING_HEADER
from tests.conftest import fake_card
from tests.support.api_server import serve

MODEL = "fake/model"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if tools %}{{ tools }}<tool_call></tool_call>{% endif %}"
)
CARD = fake_card(MODEL).model_copy(update={"engines": {"cuda": {"chat_template": TEMPLATE}}})
MESSAGES = [{"role": "user", "content": "hi"}]


def formats(schema: object) -> dict[str, tuple[dict[str, Any], str]]:
    """By route, a body whose reply must follow ``schema``, and the field that says so."""
    chat = {"messages": MESSAGES}
    named = {"type": "json_schema", "name": "x", "schema": schema}
    return {
        "/v1/chat/completions": (
            {**chat, "response_format": {"type": "json_schema", "json_schema": named}},
            "response_format.json_schema.schema",
        ),
        "/v1/completions": ({"prompt": "x", "structured_outputs": {"json": schema}}, "structured_outputs.json"),
        "/v1/responses": ({"input": "x", "text": {"format": named}}, "text.format.schema"),
        "/v1/messages": (
            {**chat, "max_tokens": 99, "output_config": {"format": {"type": "json_schema", "schema": schema}}},
            "output_config.format.schema",
        ),
        "/api/chat": ({**chat, "stream": False, "format": schema}, "format"),
    }


def calls(schema: object) -> dict[str, dict[str, Any]]:
    """By route, a body whose reply must call a tool with arguments that follow ``schema``."""
    function = {"name": "look", "parameters": schema}
    return {
        "/v1/chat/completions": {
            "messages": MESSAGES,
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "required",
        },
        "/v1/responses": {"input": "x", "tools": [{"type": "function", **function}], "tool_choice": "required"},
        "/v1/messages": {
            "messages": MESSAGES,
            "max_tokens": 99,
            "tools": [{"name": "look", "input_schema": schema}],
            "tool_choice": {"type": "any"},
        },
    }


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    directory: Path = tmp_path_factory.mktemp("schemas")
    with serve(directory, CARD) as url:
        yield url


def ask(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(url + path, json={"model": MODEL, **body}, timeout=60)


def test_an_annotation_is_told_and_does_no_harm(url: str) -> None:
    schema = {"type": "object", "properties": {"p": {"type": "string", "format": "path"}}}
    for path, (body, field) in formats(schema).items():
        reply = ask(url, path, body)
        assert reply.status_code == 200, (path, reply.text)
        assert f"{field}.properties.p.format: 'path' is not enforced" in reply.headers[WARNING_HEADER]
    for path, body in calls(schema).items():
        reply = ask(url, path, body)
        assert reply.status_code == 200, (path, reply.text)
        assert "tool 'look': properties.p.format: 'path' is not enforced" in reply.headers[WARNING_HEADER]


def test_what_cannot_be_enforced_names_the_field_or_the_tool(url: str) -> None:
    schema = {"type": "object", "properties": {"p": {"not": {"minLength": 2}}}}
    for path, (body, field) in formats(schema).items():
        reply = ask(url, path, body)
        assert reply.status_code == 400, (path, reply.text)
        assert f"{field}.properties.p.not: this keyword cannot be enforced here" in reply.text
    for path, body in calls(schema).items():
        reply = ask(url, path, body)
        assert reply.status_code == 400, (path, reply.text)
        assert "tool_choice: tool 'look': properties.p.not: this keyword cannot be enforced here" in reply.text


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "object", "properties": {"p": {"pattern": "("}}}, "the pattern '(' cannot be used: unclosed group"),
        ({"type": "object", "properties": {"p": False}, "required": ["p"]}, "the required property 'p'"),
    ],
)
def test_what_the_runner_finds_names_them_too(url: str, schema: dict[str, Any], reason: str) -> None:
    for path, (body, field) in formats(schema).items():
        reply = ask(url, path, body)
        assert (reply.status_code, f"{field}: " in reply.text, reason in reply.text) == (400, True, True), reply.text
    for path, body in calls(schema).items():
        reply = ask(url, path, body)
        named = "tool_choice: tool 'look': " in reply.text
        assert (reply.status_code, named, reason in reply.text) == (400, True, True), reply.text
