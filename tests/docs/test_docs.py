"""The OpenAPI document: it tells of every field, and what it tells is so."""

from collections.abc import Generator, Iterator, Mapping
from html import escape
from typing import Any

import httpx
import pytest
from pydantic import JsonValue

from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve

MODEL = "fake/model"
Document = Mapping[str, Any]
LISTED = "Refused unless they ask for nothing: "


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    card = fake_card(MODEL, chat_template=CHAT_TEMPLATE, n_ctx=64, eos_after=2)
    with serve(tmp_path_factory.mktemp("server"), card) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> Document:
    return client.get("/openapi.json").json()


def operations(document: Document) -> Iterator[tuple[str, str, Document]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def bodies(document: Document) -> dict[str, Document]:
    """The schemas of request bodies, by path."""
    return {
        path: named(document, operation["requestBody"]["content"]["application/json"]["schema"])
        for path, _, operation in operations(document)
        if "requestBody" in operation
    }


def named(document: Document, schema: Document) -> Document:
    return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def parts(document: Document, schema: Document, seen: set[str]) -> Iterator[tuple[str, Document]]:
    """All objects that a value of ``schema`` may have in it, each once, with their names."""
    if "$ref" in schema and schema["$ref"] not in seen:
        seen.add(schema["$ref"])
        target = named(document, schema)
        yield schema["$ref"].rpartition("/")[2], target
        for each in target.get("properties", {}).values():
            yield from parts(document, each, seen)
    for key in ("anyOf", "oneOf", "allOf"):
        for each in schema.get(key, ()):
            yield from parts(document, each, seen)
    if isinstance(schema.get("items"), dict):
        yield from parts(document, schema["items"], seen)


def test_every_route_is_summed_up_and_every_parameter_described(document: Document) -> None:
    found = list(operations(document))
    assert len(found) > 25
    for path, method, operation in found:
        assert operation["summary"], (method, path)
        for parameter in operation.get("parameters", ()):
            assert parameter.get("description"), (path, parameter["name"])


def test_every_field_of_every_request_is_described(document: Document) -> None:
    seen: set[str] = set()
    silent: list[str] = []
    for _, _, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {"": {"schema": {}}})
        for name, schema in parts(document, next(iter(content.values()))["schema"], seen):
            for field, each in schema.get("properties", {}).items():
                if not each.get("description") and not named(document, each).get("description"):
                    silent.append(f"{name}.{field}")
    assert len(seen) > 30
    assert silent == []


def test_what_only_some_runners_can_do_names_them(document: Document) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["RerankRequest"]["properties"]["documents"]["description"].endswith("Runners: cuda.")
    assert schemas["ChatCompletionRequest"]["properties"]["logprobs"]["description"].endswith(
        "Runners: cuda, mlx, vllm."
    )


def variants(document: Document, schema: Document) -> Iterator[JsonValue]:
    """Values that ``schema`` takes; of an object the shortest one, and one with each of its other fields in turn."""
    schema = named(document, schema)
    if "anyOf" in schema:
        for each in schema["anyOf"]:
            if each.get("type") != "null":
                yield from variants(document, each)
    elif "const" in schema or "enum" in schema:
        yield from schema.get("enum", [schema.get("const")])
    elif schema.get("type") == "array":
        for item in variants(document, schema["items"]):
            yield [item] * max(1, schema.get("minItems", 0))
    elif "properties" in schema:
        yield from objects(document, schema)
    else:
        plain: dict[str, JsonValue] = {"string": "x", "boolean": True, "object": {}}
        yield plain.get(schema.get("type", ""), schema.get("minimum", 1))


def objects(document: Document, schema: Document) -> Iterator[JsonValue]:
    fields = schema["properties"]
    least = {name: next(variants(document, fields[name])) for name in schema.get("required", ())}
    yield least
    for name, each in fields.items():
        for value in variants(document, each):
            yield {**least, name: value}


def test_no_field_that_is_described_is_unknown_or_refused(client: httpx.Client, document: Document) -> None:
    for path, schema in bodies(document).items():
        for body in objects(document, schema) if path not in ("/v1/models/pull", "/place_instance") else ():
            assert isinstance(body, dict)
            reply = client.post(path, json={**body, "model": MODEL})
            assert reply.status_code in (200, 400), reply.text
            assert "there is no such field" not in reply.text, (path, body)
            assert "not supported by any runner" not in reply.text, (path, body)


def test_every_field_that_is_listed_as_refused_is_refused_by_name(client: httpx.Client, document: Document) -> None:
    checked = 0
    for path, schema in bodies(document).items():
        _, _, listed = schema["description"].partition(LISTED)
        for name in filter(None, listed.rstrip(".").split(", ")):
            reply = client.post(path, json={"model": MODEL, name: {"such": "a value"}})
            assert (reply.status_code, name in reply.text) == (400, True), (path, reply.text)
            checked += 1
    assert checked > 50


def shape(value: JsonValue) -> JsonValue:
    return {key: shape(each) for key, each in value.items()} if isinstance(value, dict) else None


def test_errors_look_as_they_are_documented(client: httpx.Client, document: Document) -> None:
    for path, method, operation in operations(document):
        if "requestBody" not in operation:
            continue
        assert {"400", "401", "404", "413", "429", "503"} <= operation["responses"].keys(), path
        for body, status in (("{}", 400), ("[" * 5, 400), ("x" * (17 << 20), 413)):
            reply = client.request(method, path, content=body, headers={"content-type": "application/json"})
            assert reply.status_code == status
            example = operation["responses"][str(status)]["content"]["application/json"]["example"]
            assert shape(reply.json()) == shape(example), path


def test_a_browser_gets_every_route_without_a_script(client: httpx.Client, document: Document) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<script" not in page.text
    for path, method, operation in operations(document):
        assert f"<strong>{method.upper()} {path}</strong> {escape(operation['summary'])}" in page.text
    assert client.get("/redoc").status_code == 404
