"""Measures guided decoding: its cost, and whether its output follows the schema.

``python -m bench.grammar cost [PAIRS]``: eight streams of the demo model that must match a JSON Schema take turns with
eight free ones. Prints both output rates of each pair, their ratio, and the median of the ratios.

``python -m bench.grammar follow [COUNT [FIRST_SEED]]``: random JSON Schemas at temperature 1, eight at a time. Prints
the results and every schema that was refused or not followed. Exits with status 1 if one was not followed.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import httpx
from pydantic import JsonValue

from bench.servers import demo_server
from exo.bench.client import Client
from exo.bench.load import closed_loop
from exo.bench.options import BenchOptions
from exo.bench.prompts import body
from exo.bench.reading import read
from tests.support.random_schemas import Fate, Schema, fate, follows_formats, random_schema

STREAMS, TOKENS = 8, 64
PERSON: JsonValue = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "pattern": "^[a-z]+@[a-z]+\\.(com|org)$"},
        "roles": {"type": "array", "items": {"enum": ["reader", "writer", "owner"]}},
    },
    "required": ["name", "age", "email", "roles"],
    "additionalProperties": False,
}
PEOPLE: JsonValue = {"type": "array", "items": PERSON, "minItems": 100}
"""``TOKENS`` do not suffice to finish it."""


def rate(url: str, model: str, schema: JsonValue) -> float:
    """Output tokens per second while all streams decode. Every stream must be complete.

    A token may release no text, so the tokens of the usage are spread evenly over the chunks.
    """
    fields: dict[str, JsonValue] = {"json_schema": {"name": "people", "schema": schema}, "type": "json_schema"}
    extra: dict[str, JsonValue] = {} if schema is None else {"response_format": fields}
    options = BenchOptions(url=url, model=model, endpoint="chat", temperature=1, extra=extra)
    bodies = [body(options, f"List {number + 100} people as JSON.", number, TOKENS) for number in range(STREAMS)]
    exchanges = anyio.run(closed_loop, Client(options), bodies, STREAMS, options.time_limit)
    streams = [read(exchange) for exchange in exchanges]
    assert all(each.whole and each.completion_tokens == TOKENS for each in streams), streams
    begin, end = max(each.times[0] for each in streams), min(each.times[-1] for each in streams)
    chunks = ((sum(begin < moment <= end for moment in each.times), len(each.times)) for each in streams)
    return sum(TOKENS * within / count for within, count in chunks) / (end - begin)


def cost(url: str, model: str, pairs: int) -> None:
    """Takes turns. The first pair does not count: with the first grammar the runner reads the vocabulary."""
    ratios: list[float] = []
    for pair in range(pairs + 1):
        masked, free = rate(url, model, PEOPLE), rate(url, model, None)
        if pair:
            ratios.append(masked / free)
            print(f"with a schema {masked:6.1f} / without {free:6.1f} tokens/s = {ratios[-1]:.3f}", flush=True)
    print(f"median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


@dataclass(frozen=True, slots=True)
class SchemaOutcome:
    """The result for the schema of ``seed``. ``text`` is the reply, or the reason of the refusal."""

    seed: int
    schema: Schema
    fate: Fate
    text: str
    tokens: int = 0


def ask(client: httpx.Client, model: str, tokens: int, seed: int) -> SchemaOutcome:
    """Requests one reply. Raises ``httpx.HTTPStatusError`` for every failure but a refusal of the schema."""
    schema = random_schema(seed)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Write an example as JSON."}],
        "temperature": 1,
        "seed": seed,
        "max_tokens": tokens,
        "response_format": {"type": "json_schema", "json_schema": {"name": "example", "schema": schema}},
    }
    reply = client.post("/v1/chat/completions", json=body)
    if reply.status_code == 400:
        error = reply.json()["error"]
        assert error["param"] == "response_format.json_schema.schema", error
        return SchemaOutcome(seed, schema, "refused", error["message"].partition(": ")[2])
    made = reply.raise_for_status().json()
    (choice,) = made["choices"]
    text: str = choice["message"]["content"]
    became = fate(schema, choice["finish_reason"], text)
    return SchemaOutcome(seed, schema, became, text, made["usage"]["completion_tokens"])


def ask_all(url: str, model: str, seeds: Sequence[int], tokens: int) -> list[SchemaOutcome]:
    with httpx.Client(base_url=url, timeout=600) as client, ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(partial(ask, client, model, tokens), seeds))


def report(outcomes: Sequence[SchemaOutcome]) -> None:
    count = Counter(each.fate for each in outcomes)
    tokens = sum(each.tokens for each in outcomes)
    print(f"{len(outcomes)} schemas, {tokens} tokens: {count['valid']} finished and valid,", end=" ")
    print(f"{count['invalid']} finished and not valid, {count['cut off']} cut off, {count['refused']} refused")
    loose = [each for each in outcomes if each.fate == "valid" and not follows_formats(each.schema, each.text)]
    print(f"of the valid, {len(loose)} have a string that does not match its format by jsonschema_rs")
    for why, number in Counter(each.text for each in outcomes if each.fate == "refused").most_common():
        print(f"refused {number:3}: {why}")
    for each in outcomes:
        if each.fate == "invalid":
            print(f"not valid, seed {each.seed}: {json.dumps(each.schema)}\n  {each.text!r}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.grammar", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("cost", "follow"))
    parser.add_argument("count", type=int, nargs="?", help="pairs, by default 5, or schemas, by default 300")
    parser.add_argument("first_seed", type=int, nargs="?", default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = demo_server(Path(folder))
        with server.running(Path(folder) / "serve.log"):
            if arguments.what == "cost":
                cost(server.url, server.model, arguments.count or 5)
                return 0
            seeds = range(arguments.first_seed, arguments.first_seed + (arguments.count or 300))
            outcomes = ask_all(server.url, server.model, seeds, 400)
    report(outcomes)
    return int(any(each.fate == "invalid" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
