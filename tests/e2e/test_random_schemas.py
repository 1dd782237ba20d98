"""Random JSON Schemas through ``exo serve``, on both engines: every reply that finishes follows its own."""

import json
from collections import Counter
from collections.abc import Generator

import pytest
from pydantic import JsonValue

from bench.grammar import ask_all
from tests.support.random_schemas import fate, random_schema
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape
from tests.support.tiny.tool_template import TEMPLATE
from tests.support.twins import BACKENDS, write_twins


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    tables = write_twins(home, Shape(scale=0.5), n_ctx=1024, slots=8, chat_template=TEMPLATE)
    write_card(home, "tiny", tables, backends=BACKENDS)
    with ServeProgram(home) as server:
        yield server


@pytest.mark.parametrize(("runner", "count"), [("cuda", 30), ("mlx", 10)])
def test_every_reply_that_finishes_follows_its_schema(server: ServeProgram, runner: str, count: int) -> None:
    outcomes = ask_all(server.url, f"tiny@{runner}", range(count), 150)
    fates = Counter(each.fate for each in outcomes)
    assert fates["invalid"] == 0, [each for each in outcomes if each.fate == "invalid"]
    assert fates["valid"] > count / 2, fates


def test_what_became_of_a_reply() -> None:
    schema: dict[str, JsonValue] = {"type": "integer", "minimum": 3}
    assert fate(schema, "stop", "4") == "valid"
    assert fate(schema, "stop", "2") == fate(schema, "stop", "4 ,") == fate(schema, "stop", '"4"') == "invalid"
    assert fate(schema, "length", "2") == "cut off"


def test_schemas_are_of_many_kinds_and_the_same_for_the_same_seed() -> None:
    text = json.dumps([random_schema(seed) for seed in range(100)])
    assert text == json.dumps([random_schema(seed) for seed in range(100)])
    for word in ("$ref", "anyOf", "oneOf", "allOf", "pattern", "format", "enum", "const", "maxItems", "exclusiveMin"):
        assert f'"{word}' in text
