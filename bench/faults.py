"""Kills and stops the runner of ``exo serve`` at random times while eight streams run on a tiny float32 model.

``python -m bench.faults [FAULTS] [RUNNER] [SEED]``, from the root of the repository, prints what became of the streams.
Every text is compared with that of the undisturbed run, and every usage with the tokens asked for.
"""

import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from pydantic import BaseModel, JsonValue

from tests.server import ServeProgram, write_card
from tests.tiny import Shape, write_gguf, write_mlx

STREAMS, TOKENS = 8, 1500
STOPPED_SHARE = 0.05
"""Of the faults; the others are kills. A stopped runner costs its heartbeat deadline each time."""


class Choice(BaseModel):
    """What of a chunk's choice matters here."""

    text: str


class Counts(BaseModel):
    """What of the usage matters here."""

    completion_tokens: int


class Chunk(BaseModel):
    """One event of a stream."""

    choices: list[Choice]
    usage: Counts | None = None


@dataclass(slots=True)
class Outcome:
    """What the streams saw. ``recovery`` are seconds from a fault to the next text of a new runner."""

    whole: int = 0
    lost: int = 0
    different: int = 0
    miscounted: int = 0
    recovery: dict[str, list[float]] = field(default_factory=lambda: {"SIGKILL": [], "SIGSTOP": []})
    text_came: asyncio.Event = field(default_factory=asyncio.Event)
    done: bool = False


def body_of(number: int) -> dict[str, object]:
    """The request of a stream."""
    return {
        "model": "tiny",
        "prompt": f"story {number}",
        "max_tokens": TOKENS,
        "seed": number,
        "temperature": 0.9,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def stream(client: httpx.AsyncClient, body: Mapping[str, object], outcome: Outcome) -> tuple[str, int] | None:
    """The text and the completion tokens of one stream; None where it ended without [DONE]."""
    text, tokens, done = "", 0, False
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            print((await reply.aread()).decode(), file=sys.stderr)
            return None
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            if done := line == "data: [DONE]":
                break
            if line.startswith('data: {"error"'):
                print(line, file=sys.stderr)
                return None
            chunk = Chunk.model_validate_json(line[6:])
            new = "".join(choice.text for choice in chunk.choices)
            text += new
            if new:
                outcome.text_came.set()
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return (text, tokens) if done else None


async def keep_streaming(client: httpx.AsyncClient, number: int, expected: str, outcome: Outcome) -> None:
    """One stream after another until the faults are over."""
    while not outcome.done:
        result = await stream(client, body_of(number), outcome)
        outcome.whole += result is not None
        outcome.lost += result is None
        outcome.different += result is not None and result[0] != expected
        outcome.miscounted += result is not None and result[1] != TOKENS


async def disturb(server: ServeProgram, faults: int, dice: random.Random, outcome: Outcome) -> None:
    """One fault after another, each at a random time after text has come from a new runner."""
    for _ in range(faults):
        await asyncio.sleep(dice.uniform(0.0, 0.6))
        (runner,) = server.runners()
        number = signal.SIGSTOP if dice.random() < STOPPED_SHARE else signal.SIGKILL
        begin = time.monotonic()
        os.kill(runner.pid, number)
        while [each.pid for each in server.runners()] in ([], [runner.pid]):  # noqa: ASYNC110 (no event tells of it)
            await asyncio.sleep(0.01)
        outcome.text_came.clear()
        await outcome.text_came.wait()
        outcome.recovery[number.name].append(time.monotonic() - begin)
    outcome.done = True


async def campaign(server: ServeProgram, faults: int, seed: int) -> Outcome:
    """The undisturbed texts, then the faults."""
    outcome = Outcome()
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        undisturbed = [await stream(client, body_of(number), outcome) for number in range(STREAMS)]
        async with asyncio.TaskGroup() as tasks:
            for number, result in enumerate(undisturbed):
                assert result is not None
                tasks.create_task(keep_streaming(client, number, result[0], outcome))
            tasks.create_task(disturb(server, faults, random.Random(seed), outcome))
    return outcome


def write_model(home: Path, runner: str) -> None:
    """The tiny model for either engine, in float32."""
    write_gguf(home / "tiny.gguf", Shape())
    write_mlx(home / "tiny", Shape())
    size: dict[str, JsonValue] = {"n_ctx": 2048, "slots": STREAMS}
    flat: dict[str, JsonValue] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "threads": 1}
    tables: dict[str, dict[str, JsonValue]] = {
        "cuda": {"path": str(home / "tiny.gguf"), **flat, **size},
        "mlx": {"path": str(home / "tiny"), "dtype": "float32", **size},
    }
    write_card(home, "tiny", tables, backends=["LlamaCppCpu", "MlxCpu"], runner=runner)


def main() -> None:
    """Runs the campaign and prints its figures; exits with 1 where a promise is broken."""
    arguments = [*sys.argv[1:], *("200", "cuda", "0")[len(sys.argv) - 1 :]]
    faults, runner, seed = int(arguments[0]), arguments[1], int(arguments[2])
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        write_model(home, runner)
        with ServeProgram(home) as server:
            begin = time.monotonic()
            server.complete("tiny", max_tokens=1)
            load_seconds = time.monotonic() - begin
            before = psutil.Process(server.process.pid).memory_info().rss
            outcome = asyncio.run(campaign(server, faults, seed))
            after = psutil.Process(server.process.pid).memory_info().rss
            left = len(server.runners()) - 1
    print(f"runner {runner}, {faults} faults, seed {seed}; first load and token {load_seconds:.2f} s")
    print(
        f"streams: {outcome.whole} whole, {outcome.lost} lost, {outcome.different} with another text than undisturbed"
    )
    print(f"usage wrong: {outcome.miscounted}; runners left over: {left}")
    for name, seconds in outcome.recovery.items():
        if seconds:
            p95 = sorted(seconds)[int(0.95 * (len(seconds) - 1))]
            print(
                f"{name}: {len(seconds)}, to the next text: median {statistics.median(seconds):.2f} s, p95 {p95:.2f} s"
            )
    print(f"memory of the server: {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after")
    sys.exit(1 if outcome.lost or outcome.different or outcome.miscounted or left else 0)


if __name__ == "__main__":
    main()
