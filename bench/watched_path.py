"""Measures what monitoring costs a server: the fake runner through ``exo serve``, watched and unwatched in turn.

``python -m bench.watched_path [--pairs N] [--json FILE]`` prints the rate of output over 16 connections as fast as the
server can, and the server's CPU time per token of 16 streams at an engine's pace. Watched means that another process
scrapes ``/metrics`` once a second and reads ``/v1/activity/events`` twice.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx
import psutil

from bench.server_path import PACED_STEP_SECONDS, cpu_us, measured, options, spread
from tests.support.server import ServeProgram, write_card

STREAMS, TOKENS, PACED_STREAMS = 16, 2048, 16
SCRAPE_SECONDS = 1.0
PROMISED_RATIO = 0.98


async def watch(url: str) -> None:
    """Scrapes and reads events until it is killed. Prints a line once both event streams have begun."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        begun = asyncio.Semaphore(0)

        async def read_events() -> None:
            async with client.stream("GET", "/v1/activity/events") as reply:
                async for _ in reply.aiter_raw():
                    begun.release()

        async def scrape() -> None:
            while True:
                (await client.get("/metrics")).raise_for_status()
                await asyncio.sleep(SCRAPE_SECONDS)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(2):
                tasks.create_task(read_events())
            tasks.create_task(scrape())
            await begun.acquire()
            await begun.acquire()
            print("watching", flush=True)


@contextmanager
def watched(url: str) -> Generator[None]:
    """Has another process watch the server."""
    command = [sys.executable, "-m", "bench.watched_path", "--watch", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"
        try:
            yield
        finally:
            process.kill()


def rate(url: str, seed: int) -> float:
    """Streamed tokens per second over all connections."""
    asked = options(url, connections=STREAMS, requests=STREAMS, tokens=TOKENS, seed=seed)
    return measured(asked).output_tokens_per_second


def measure(pairs: int) -> dict[str, list[float]]:
    """Measures watched and unwatched in turn, ``pairs`` times, after a first time that does not count."""
    found: dict[str, list[float]] = {"rate": [], "watched_rate": [], "cpu_us": [], "watched_cpu_us": []}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_card(home, "fake", {"cuda": {"slots": STREAMS, "n_ctx": 4096}}, backends=["LlamaCppCpu"])
        paced = {"slots": PACED_STREAMS, "n_ctx": 4096, "step_seconds": PACED_STEP_SECONDS}
        write_card(home, "paced", {"cuda": paced}, backends=["LlamaCppCpu"])
        with ServeProgram(home, fake=True) as program:
            server = psutil.Process(program.process.pid)
            for seed in range(pairs + 1):
                values = {"rate": rate(program.url, seed), "cpu_us": cpu_us(server, program.url, PACED_STREAMS, seed)}
                with watched(program.url):
                    values["watched_rate"] = rate(program.url, seed)
                    values["watched_cpu_us"] = cpu_us(server, program.url, PACED_STREAMS, seed)
                for name, value in values.items() if seed else ():
                    found[name].append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--watch", metavar="URL", help="watch a server until killed")
    arguments = parser.parse_args()
    if arguments.watch is not None:
        asyncio.run(watch(arguments.watch))
    found = measure(arguments.pairs)
    spread("tokens/s, unwatched", found["rate"], "per s")
    spread("tokens/s, watched", found["watched_rate"], "per s")
    spread("CPU per token, unwatched", found["cpu_us"], "us")
    spread("CPU per token, watched", found["watched_cpu_us"], "us")
    ratios = [one / other for one, other in zip(found["watched_rate"], found["rate"], strict=True)]
    spread("rate watched / unwatched", ratios, f"(promised: {PROMISED_RATIO})")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(median(ratios) < PROMISED_RATIO)


if __name__ == "__main__":
    main()
