"""Whether constrained output follows its schema: random JSON Schemas on the demo model at temperature 1, eight at once.

``python -m bench.schemas [COUNT [FIRST_SEED]]``, from the root of the repository: prints what became of the replies and
every schema that was refused or, which must not be, not followed. Its exit status is 1 if there is one of those.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from bench.streams import MODEL, start_server, wait_until_ready
from tests.support.random_schemas import Fate, Schema, fate, follows_formats, random_schema

COUNT, AT_ONCE, TOKENS = 300, 8, 400


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the schema of ``seed``; ``text`` is the reply, or why there is none."""

    seed: int
    schema: Schema
    fate: Fate
    text: str
    tokens: int = 0


def ask(client: httpx.Client, model: str, tokens: int, seed: int) -> Outcome:
    """One schema, one reply. Raises ``httpx.HTTPStatusError`` for any failure but a refusal of the schema."""
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
        return Outcome(seed, schema, "refused", error["message"].partition(": ")[2])
    made = reply.raise_for_status().json()
    (choice,) = made["choices"]
    text: str = choice["message"]["content"]
    became = fate(schema, choice["finish_reason"], text)
    return Outcome(seed, schema, became, text, made["usage"]["completion_tokens"])


def ask_all(url: str, model: str, seeds: Sequence[int], tokens: int) -> list[Outcome]:
    """In the order of the seeds."""
    with httpx.Client(base_url=url, timeout=600) as client, ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(partial(ask, client, model, tokens), seeds))


def report(outcomes: Sequence[Outcome]) -> None:
    """Prints all there is to know."""
    count = Counter(each.fate for each in outcomes)
    tokens = sum(each.tokens for each in outcomes)
    print(f"{len(outcomes)} schemas, {tokens} tokens: {count['valid']} finished and valid,", end=" ")
    print(f"{count['invalid']} finished and not valid, {count['cut off']} cut off, {count['refused']} refused")
    loose = [each for each in outcomes if each.fate == "valid" and not follows_formats(each.schema, each.text)]
    print(f"of the valid, {len(loose)} have a string that jsonschema_rs does not count as of its format")
    for why, number in Counter(each.text for each in outcomes if each.fate == "refused").most_common():
        print(f"refused {number:3}: {why}")
    for each in outcomes:
        if each.fate == "invalid":
            print(f"not valid, seed {each.seed}: {json.dumps(each.schema)}\n  {each.text!r}")


def main() -> int:
    """The exit status."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        server, url, _ = start_server(Path(folder), "--load", MODEL)
        try:
            wait_until_ready(url)
            outcomes = ask_all(url, MODEL, range(first, first + count), TOKENS)
        finally:
            server.terminate()
            server.wait()
    report(outcomes)
    return int(any(each.fate == "invalid" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
