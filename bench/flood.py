"""Ten times the requests that the slots can serve, for 30 seconds, against ``exo serve``.

``python -m bench.flood [--runner fake|cuda] [--seconds N]``, from the root of the repository, with the tests' fake
runner or llama.cpp on a tiny model: prints how soon what is refused is answered, by how much the memory of the server
grows, and what the flood does to streams that run through it, whose every token is compared with those of the same
streams without a flood. Ends with status 1 where a promise is broken.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.burst import Asked, Burst, text_of
from bench.report import Promise, Spread
from bench.target import tiny
from bench.time_limit import end_within
from bench.watched_stream import WatchedStream
from tests.support.server import ServeProgram, write_card

STREAMS, SLOTS, MAX_QUEUE = 4, 8, 16
REQUEST_SECONDS = 0.2
"""What a request of the flood takes when it is served."""
RATE = 10 * (SLOTS - STREAMS) / REQUEST_SECONDS
"""Requests a second."""
N_CTX = 1 << 15
MEMORY_BYTES = 20e6
REFUSED_SECONDS = 0.1
_WARM_UP_SECONDS = 3.0
_CALIBRATION_TOKENS = 300

Body = Callable[[int], dict[str, object]]
"""The request of a stream by its number."""


@dataclass(frozen=True, slots=True)
class Found:
    """Streams without and with the flood, what became of the flood, and memory of the server in bytes."""

    seconds: float
    quiet: list[WatchedStream]
    loud: list[WatchedStream]
    burst: Burst
    before: int
    after: int

    def promises(self) -> list[Promise]:
        """Each, and whether it was kept."""
        refused = Spread.of(self.burst.refused_seconds)
        unharmed = all(
            two.done and two.usage_exact and (one.ids, one.text) == (two.ids, two.text)
            for one, two in zip(self.quiet, self.loud, strict=True)
        )
        kept = {
            f"memory grows by less than {MEMORY_BYTES / 1e6:.0f} MB": self.after - self.before < MEMORY_BYTES,
            f"99 of 100 refused within {REFUSED_SECONDS * 1e3:.0f} ms": refused and refused.p99 < REFUSED_SECONDS,
            "every token of the streams that of the quiet ones": unharmed,
            "whatever is not refused is served as asked": self.burst.wrong == self.burst.unexpected == 0,
        }
        return [Promise(text=text, kept=bool(value)) for text, value in kept.items()]


async def streams(url: str, body: Body, tokens: int) -> list[WatchedStream]:
    """All streams at once, to their ends."""
    found = [WatchedStream(number, tokens) for number in range(STREAMS)]
    await asyncio.gather(*(each.read(url, body(each.number)) for each in found))
    if errors := [each.error or f"refused with {each.refused}" for each in found if not each.done]:
        print(*errors, sep="\n", file=sys.stderr)
    return found


def gaps(found: list[WatchedStream]) -> list[float]:
    """Seconds between one token and the next."""
    return [two - one for each in found for one, two in zip(each.times, each.times[1:], strict=False)]


async def flood(url: str, asked: Asked, seconds: float, burst: Burst) -> None:
    """``RATE`` requests a second, whatever becomes of them; returns when the last is answered."""
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number in range(int(seconds * RATE)):
            await asyncio.sleep(max(0.0, began + number / RATE - time.perf_counter()))
            tasks.create_task(burst.ask(url, asked))


async def measure(url: str, body: Body, seconds: float, server: psutil.Process) -> Found:
    """The same streams twice, the second time through the flood."""
    step = statistics.mean(gaps(await streams(url, body, _CALIBRATION_TOKENS)))
    asked = Asked(body(0), max(1, round(REQUEST_SECONDS / step)))
    asked = Asked(asked.body, asked.tokens, await text_of(url, asked))
    tokens = min(int(seconds / step), N_CTX - 256)
    await flood(url, asked, _WARM_UP_SECONDS, Burst())
    before = server.memory_info().rss
    quiet, burst = await streams(url, body, tokens), Burst()
    loud, _ = await asyncio.gather(streams(url, body, tokens), flood(url, asked, seconds, burst))
    return Found(seconds, quiet, loud, burst, before, server.memory_info().rss)


def show(found: Found) -> None:
    """Prints the figures."""
    statuses = found.burst.statuses
    print(f"{sum(statuses.values())} requests in {found.seconds:g} s: {dict(statuses)}")
    refused = Spread.of(found.burst.refused_seconds)
    print(f"refused within: {refused.milliseconds() if refused else 'none was'}")
    print(f"memory of the server: {found.before / 1e6:.1f} MB before, {found.after / 1e6:.1f} MB after")
    for name, each in (("without", found.quiet), ("with", found.loud)):
        spread = Spread.of(gaps(each))
        took = max((stream.times[-1] - stream.times[0] for stream in each if stream.times), default=0)
        print(f"{STREAMS} streams {name} flood, {took:.0f} s: token gap {spread and spread.milliseconds()}")
    for promise in found.promises():
        print(f"{'kept' if promise.kept else 'BROKEN':<8}{promise.text}")


def prepare(home: Path, runner: str) -> Body:
    """Puts the model in place."""
    if runner == "cuda":
        return asyncio.run(tiny(home, runner, N_CTX)).body
    table = {"slots": SLOTS, "n_ctx": 1_000_000, "step_seconds": 0.01}
    write_card(home, "fake", {"cuda": table}, backends=["LlamaCppCpu"])
    return lambda _: {"model": "fake", "prompt": "hi", "temperature": 0, "ignore_eos": True}


def main() -> None:
    """Runs the bench on a server of its own."""
    parser = argparse.ArgumentParser(prog="bench.flood")
    parser.add_argument("--runner", choices=["fake", "cuda"], default="fake")
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    end_within(600 + 20 * arguments.seconds)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        body = prepare(home, arguments.runner)
        with ServeProgram(home, fake=arguments.runner == "fake", EXO_MAX_QUEUE=str(MAX_QUEUE)) as program:
            server = psutil.Process(program.process.pid)
            found = asyncio.run(measure(program.url, body, arguments.seconds, server))
    show(found)
    sys.exit(0 if all(promise.kept for promise in found.promises()) else 1)


if __name__ == "__main__":
    main()
