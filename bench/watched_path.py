"""Measures what monitoring costs: servers that are watched and unwatched in turn.

``python -m bench.watched_path [--pairs N] [--tabs N] [--json FILE]`` prints the rate of output of 16 streams of the
demo model, and the CPU time per token of a server with the fake runner, whose 16 streams have an engine's pace. Watched
means that another process scrapes ``/metrics`` once a second and reads ``/v1/activity/events`` twice, as two pages in
browsers elsewhere do. With ``--tabs``, Chromium on this machine shows the page's view of requests that often instead,
and what it computes is missing to the model.
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import httpx
import psutil
from playwright.async_api import async_playwright

from bench.peer_report import Scenario
from bench.peers import ask
from bench.server_path import PACED_STEP_SECONDS, cpu_us, spread
from bench.servers import demo_server
from tests.support.server import ServeProgram, write_card

STREAMS = Scenario("watched", 16, (), {"requests": 32})
SCRAPE_SECONDS = 1.0
PROMISED_RATIO = 0.98
CHROMIUM = shutil.which("chromium")
_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage")


async def watch(url: str, readers: int, tabs: int) -> None:
    """Scrapes, reads events and shows the page until it is killed. Prints a line once all of these have begun."""
    begun = asyncio.Semaphore(0)

    async def read_events(client: httpx.AsyncClient) -> None:
        async with client.stream("GET", "/v1/activity/events") as reply:
            async for _ in reply.aiter_raw():
                begun.release()

    async def scrape(client: httpx.AsyncClient) -> None:
        while True:
            (await client.get("/metrics")).raise_for_status()
            await asyncio.sleep(SCRAPE_SECONDS)

    async with (
        async_playwright() as playwright,
        httpx.AsyncClient(base_url=url, timeout=None) as client,
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(scrape(client))
        for _ in range(readers):
            tasks.create_task(read_events(client))
            await begun.acquire()
        if tabs:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
            for _ in range(tabs):
                page = await browser.new_page()
                await page.goto(f"{url}/#now")
        print("watching", flush=True)


@contextmanager
def watched(url: str, tabs: int) -> Generator[None]:
    """Has another process watch the server."""
    command = [sys.executable, "-m", "bench.watched_path", "--watch", url, "--tabs", str(tabs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"
        children = psutil.Process(process.pid).children(recursive=True)
        try:
            yield
        finally:
            process.kill()
            for child in children:
                child.kill()


def measure(pairs: int, tabs: int) -> dict[str, list[float]]:
    """Measures watched and unwatched in turn, ``pairs`` times, after a first time that does not count."""
    found: dict[str, list[float]] = {"rate": [], "watched_rate": [], "cpu_us": [], "watched_cpu_us": []}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        paced = {"slots": STREAMS.streams, "n_ctx": 4096, "step_seconds": PACED_STEP_SECONDS}
        write_card(home, "paced", {"cuda": paced}, backends=["LlamaCppCpu"])
        demo = demo_server(home / "demo")
        with ServeProgram(home, fake=True) as program, demo.running(home / "demo.log"):
            server = psutil.Process(program.process.pid)

            def values(turn: int, prefix: str = "") -> dict[str, float]:
                stage = ask(demo, replace(STREAMS, name=f"{turn}{prefix}"), turn, tiny=False)
                return {f"{prefix}rate": stage.output_tokens_per_second}

            for turn in range(pairs + 1):
                row = values(turn) | {"cpu_us": cpu_us(server, program.url, STREAMS.streams, turn)}
                with watched(demo.url, tabs):
                    row |= values(turn, "watched_")
                with watched(program.url, tabs):
                    row["watched_cpu_us"] = cpu_us(server, program.url, STREAMS.streams, turn)
                print({name: round(value, 1) for name, value in row.items()}, flush=True)
                for name, value in row.items() if turn else ():
                    found[name].append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tabs", type=int, default=0, help="pages in Chromium instead of event streams")
    parser.add_argument("--watch", metavar="URL", help="watch a server until killed")
    arguments = parser.parse_args()
    if arguments.watch is not None:
        asyncio.run(watch(arguments.watch, 0 if arguments.tabs else 2, arguments.tabs))
    found = measure(arguments.pairs, arguments.tabs)
    spread("tokens/s of the demo model, unwatched", found["rate"], "per s")
    spread("tokens/s of the demo model, watched", found["watched_rate"], "per s")
    spread("CPU per token, unwatched", found["cpu_us"], "us")
    spread("CPU per token, watched", found["watched_cpu_us"], "us")
    ratios = [one / other for one, other in zip(found["watched_rate"], found["rate"], strict=True)]
    spread("rate watched / unwatched", ratios, f"(promised: {PROMISED_RATIO})")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(median(ratios) < PROMISED_RATIO)


if __name__ == "__main__":
    main()
