"""Ten times the requests that the slots can serve, for 30 seconds, against ``exo serve`` with the tests' fake runner.

``python -m bench.flood [SECONDS]``, from the root of the repository: prints how soon what is refused is answered, by
how much the memory of the server grows, and what the flood does to streams that run through it. The fake runner's text
is known beforehand, so every token of them is checked.
"""

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.fake_runner import expected_text
from tests.server import ServeProgram, write_card

STEP_SECONDS = 0.01
STREAMS, SLOTS, TOKENS = 4, 8, 20
RATE = 10 * (SLOTS - STREAMS) / (TOKENS * STEP_SECONDS)
"""Requests a second."""


@dataclass(slots=True)
class Outcome:
    """Statuses of the requests, seconds to the whole answer of those refused, and gaps between a stream's tokens."""

    statuses: Counter[int] = field(default_factory=Counter[int])
    refused_seconds: list[float] = field(default_factory=list[float])
    gaps: list[float] = field(default_factory=list[float])
    texts: list[str] = field(default_factory=list[str])


def request(url: httpx.URL, body: Mapping[str, object]) -> bytes:
    """A request for a completion, as bytes on the wire."""
    payload = json.dumps({"model": "fake", "prompt": "hi", "temperature": 0, **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {url.host}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


async def ask(url: httpx.URL, payload: bytes, outcome: Outcome) -> None:
    """One request of the flood, over a connection of its own."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(payload)
    status = int((await reader.read()).split(b" ", 2)[1])
    writer.close()
    outcome.statuses[status] += 1
    if status == 429:
        outcome.refused_seconds.append(time.perf_counter() - began)


async def follow(url: httpx.URL, tokens: int, outcome: Outcome) -> None:
    """One stream through the flood."""
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(request(url, {"max_tokens": tokens, "stream": True}))
    text, last = "", 0.0
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            now = time.perf_counter()
            outcome.gaps += [now - last] if last else []
            last = now
            text += json.loads(line[6:])["choices"][0]["text"]
    writer.close()
    outcome.texts.append(text)


async def flood(url: httpx.URL, seconds: float, outcome: Outcome) -> None:
    """``RATE`` requests a second, whatever becomes of them; returns when the last is answered."""
    payload = request(url, {"max_tokens": TOKENS})
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number in range(int(seconds * RATE)):
            await asyncio.sleep(max(0.0, began + number / RATE - time.perf_counter()))
            tasks.create_task(ask(url, payload, outcome))


async def measure(url: httpx.URL, seconds: float, server: psutil.Process) -> None:
    """Prints the figures. Raises AssertionError where a stream was harmed."""
    await flood(url, 3, Outcome())
    before = server.memory_info().rss
    quiet, loud = Outcome(), Outcome()
    await asyncio.gather(*(follow(url, 200, quiet) for _ in range(STREAMS)))
    tokens = int(seconds / STEP_SECONDS)
    await asyncio.gather(flood(url, seconds, loud), *(follow(url, tokens, loud) for _ in range(STREAMS)))
    after = server.memory_info().rss
    assert loud.texts == [expected_text("hi", tokens)] * STREAMS, "a stream was harmed"
    refused = statistics.quantiles(loud.refused_seconds, n=100)
    print(f"{sum(loud.statuses.values())} requests in {seconds:g} s: {dict(loud.statuses)}")
    print(f"refused within: median {refused[49] * 1e3:.1f} ms, 99 of 100 {refused[98] * 1e3:.1f} ms")
    print(f"memory of the server: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after")
    for name, outcome in (("without", quiet), ("with", loud)):
        gaps = statistics.quantiles(outcome.gaps, n=100)
        print(
            f"token gap of {STREAMS} streams {name} flood: median {gaps[49] * 1e3:.1f} ms, p99 {gaps[98] * 1e3:.1f} ms"
        )


def main() -> None:
    """Runs the bench on a server of its own."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    with tempfile.TemporaryDirectory() as folder:
        table = {"slots": SLOTS, "n_ctx": 1_000_000, "step_seconds": STEP_SECONDS}
        write_card(Path(folder), "fake", {"cuda": table}, backends=["LlamaCppCpu"])
        with ServeProgram(Path(folder), fake=True, EXO_MAX_QUEUE="16") as program:
            assert program.complete("fake", max_tokens=1).status_code == 200
            asyncio.run(measure(httpx.URL(program.url), seconds, psutil.Process(program.process.pid)))


if __name__ == "__main__":
    main()
