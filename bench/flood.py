"""Sends ``exo serve`` ten times the requests that its slots can serve, for 30 seconds.

``python -m bench.flood [--runner fake|cuda] [--seconds N]``, with the tests' fake runner or llama.cpp on a tiny model,
prints the times of refusals, the growth of the server's memory, and the effect on streams that run meanwhile. Every
token of these is compared with the same streams without a flood. Exits with status 1 if a promise is broken.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from bench.fault_report import Spread, promise_lines
from bench.servers import end_within
from bench.streams import Burst, ExpectedReply, WatchedStream, client_of, text_of
from bench.target import tiny
from exo.bench.client import Client
from tests.support.server import ServeProgram, write_card

STREAMS, SLOTS, MAX_QUEUE = 4, 8, 16
REQUEST_SECONDS = 0.2
"""The time that a served request of the flood takes."""
RATE = 10 * (SLOTS - STREAMS) / REQUEST_SECONDS
"""Requests per second."""
N_CTX = 1 << 15
MEMORY_BYTES = 20e6
REFUSED_SECONDS = 0.1
_WARM_UP_SECONDS = 3.0
_CALIBRATION_TOKENS = 300

Body = Callable[[int], dict[str, object]]
"""The request of a stream, by its number."""


@dataclass(frozen=True, slots=True)
class FloodResult:
    """The streams without and with the flood, the replies to the flood, and the server's memory in bytes."""

    seconds: float
    quiet: list[WatchedStream]
    loud: list[WatchedStream]
    burst: Burst
    before: int
    after: int

    def promises(self) -> dict[str, bool]:
        refused = Spread.of(self.burst.refused_seconds)
        unharmed = all(
            two.done and two.usage_exact and (one.ids, one.reply.text) == (two.ids, two.reply.text)
            for one, two in zip(self.quiet, self.loud, strict=True)
        )
        kept = {
            f"memory grows by less than {MEMORY_BYTES / 1e6:.0f} MB": self.after - self.before < MEMORY_BYTES,
            f"99 of 100 refused within {REFUSED_SECONDS * 1e3:.0f} ms": refused and refused.p99 < REFUSED_SECONDS,
            "every token of the streams equals that of the quiet ones": unharmed,
            "every other request is served correctly": self.burst.wrong == self.burst.unexpected == 0,
        }
        return {text: bool(value) for text, value in kept.items()}


async def streams(client: Client, body: Body, tokens: int) -> list[WatchedStream]:
    found = [WatchedStream(number, tokens) for number in range(STREAMS)]
    await asyncio.gather(*(each.read(client, body(each.number)) for each in found))
    if errors := [each.error or f"refused with {each.refused}" for each in found if not each.done]:
        print(*errors, sep="\n", file=sys.stderr)
    return found


def gaps(found: list[WatchedStream]) -> list[float]:
    return [two - one for each in found for one, two in pairwise(each.reply.times)]


async def flood(client: Client, asked: ExpectedReply, seconds: float, burst: Burst) -> None:
    """Sends ``RATE`` requests per second, whatever becomes of them. Returns after the last reply."""
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number in range(int(seconds * RATE)):
            await asyncio.sleep(max(0.0, began + number / RATE - time.perf_counter()))
            tasks.create_task(burst.ask(client, asked))


async def measure(client: Client, body: Body, seconds: float, server: psutil.Process) -> FloodResult:
    """Runs the same streams twice, the second time during the flood."""
    step = statistics.mean(gaps(await streams(client, body, _CALIBRATION_TOKENS)))
    asked = ExpectedReply(body(0), max(1, round(REQUEST_SECONDS / step)))
    asked = ExpectedReply(asked.body, asked.tokens, await text_of(client, asked))
    tokens = min(int(seconds / step), N_CTX - 256)
    await flood(client, asked, _WARM_UP_SECONDS, Burst())
    before = server.memory_info().rss
    quiet, burst = await streams(client, body, tokens), Burst()
    loud, _ = await asyncio.gather(streams(client, body, tokens), flood(client, asked, seconds, burst))
    return FloodResult(seconds, quiet, loud, burst, before, server.memory_info().rss)


def show(found: FloodResult) -> None:
    statuses = found.burst.statuses
    print(f"{sum(statuses.values())} requests in {found.seconds:g} s: {dict(statuses)}")
    refused = Spread.of(found.burst.refused_seconds)
    print(f"refused within: {refused.milliseconds() if refused else 'none was'}")
    print(f"memory of the server: {found.before / 1e6:.1f} MB before, {found.after / 1e6:.1f} MB after")
    for name, each in (("without", found.quiet), ("with", found.loud)):
        spread = Spread.of(gaps(each))
        took = max((stream.reply.times[-1] - stream.reply.times[0] for stream in each if stream.reply.times), default=0)
        print(f"{STREAMS} streams {name} flood, {took:.0f} s: token gap {spread and spread.milliseconds()}")
    print(*promise_lines(found.promises()), sep="\n")


def prepare(home: Path, runner: str) -> Body:
    if runner == "cuda":
        return asyncio.run(tiny(home, runner, N_CTX)).body
    table = {"slots": SLOTS, "n_ctx": 1_000_000, "step_seconds": 0.01}
    write_card(home, "fake", {"cuda": table}, backends=["LlamaCppCpu"])
    return lambda _: {"model": "fake", "prompt": "hi", "temperature": 0, "ignore_eos": True}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.flood", description=__doc__)
    parser.add_argument("--runner", choices=["fake", "cuda"], default="fake")
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    end_within(600 + 20 * arguments.seconds)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        body = prepare(home, arguments.runner)
        with ServeProgram(home, fake=arguments.runner == "fake", EXO_MAX_QUEUE=str(MAX_QUEUE)) as program:
            server = psutil.Process(program.process.pid)
            found = asyncio.run(measure(client_of(program.url), body, arguments.seconds, server))
    show(found)
    sys.exit(0 if all(found.promises().values()) else 1)


if __name__ == "__main__":
    main()
