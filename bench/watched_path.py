"""Measures what monitoring costs: servers that are watched and unwatched in turn.

``python -m bench.watched_path [--pairs N] [--tabs N | --windows N] [--json FILE]`` prints the rate of output of 16
streams of the demo model, and the CPU time per token of a server with the fake runner, whose 16 streams have an
engine's pace. Watched means that another process scrapes ``/metrics`` once a second and reads ``/v1/activity/events``
twice, as two pages in browsers elsewhere do. With ``--tabs`` or ``--windows``, Chromium on this machine shows the
page's view of requests that often instead, and what it computes is missing to the model. Its CPU time is printed by
process, less that of Chromium with an empty page. Of the tabs of one window only the last one is seen.
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import httpx
import psutil

from bench.chromium import chromium, cpu_seconds
from bench.peer_report import Scenario
from bench.peers import ask
from bench.server_path import PACED_STEP_SECONDS, cpu_us, spread
from bench.servers import demo_server
from tests.support.server import ServeProgram, write_card

STREAMS = Scenario("watched", 16, (), {"requests": 32})
SCRAPE_SECONDS = 1.0
PROMISED_RATIO = 0.98
Cpu = dict[str, float]
"""CPU time by the type of a process of Chromium."""
IDLE_SECONDS = 20.0
"""How long Chromium's CPU time with an empty page is measured."""


async def watch(url: str, readers: int) -> None:
    """Scrapes and reads events until it is killed. Prints a line once both have begun."""
    begun = asyncio.Semaphore(0)

    async def read_events(client: httpx.AsyncClient) -> None:
        async with client.stream("GET", "/v1/activity/events") as reply:
            async for _ in reply.aiter_raw():
                begun.release()

    async def scrape(client: httpx.AsyncClient) -> None:
        while True:
            (await client.get("/metrics")).raise_for_status()
            await asyncio.sleep(SCRAPE_SECONDS)

    async with httpx.AsyncClient(base_url=url, timeout=None) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(scrape(client))
        for _ in range(readers):
            tasks.create_task(read_events(client))
            await begun.acquire()
        print("watching", flush=True)


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages on this machine: ``count`` of them, in ``windows`` of their own or as tabs of one window."""

    count: int
    windows: bool

    @contextmanager
    def shown(self, url: str, cpu: list[Cpu]) -> Generator[None]:
        """Shows the view of requests, and notes Chromium's CPU milliseconds per second."""
        urls = [f"{url}/#now"] * self.count
        with chromium(_chromium(), urls, windows=self.windows, title="Now \u00b7 exo") as browser:
            before, began = cpu_seconds(browser), time.monotonic()
            yield
            cpu.append(_per_second(before, cpu_seconds(browser), time.monotonic() - began))


def _chromium() -> str:
    command = shutil.which("chromium") or shutil.which("google-chrome")
    return command or sys.exit("Chromium is not installed; Debian's package is called chromium")


def _per_second(before: Cpu, after: Cpu, seconds: float) -> Cpu:
    return {kind: 1000 * (after[kind] - before.get(kind, 0)) / seconds for kind in after}


def empty_page() -> Cpu:
    """The CPU milliseconds per second of Chromium that shows nothing."""
    with chromium(_chromium(), (), windows=True, title="") as browser:
        time.sleep(5)
        before = cpu_seconds(browser)
        time.sleep(IDLE_SECONDS)
        return _per_second(before, cpu_seconds(browser), IDLE_SECONDS)


@contextmanager
def watched(url: str, pages: Pages, cpu: list[Cpu]) -> Generator[None]:
    """Has other processes watch the server."""
    command = [sys.executable, "-m", "bench.watched_path", "--watch", url]
    command += ["--readers", str(0 if pages.count else 2)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, ExitStack() as closing:
        closing.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"
        if pages.count:
            closing.enter_context(pages.shown(url, cpu))
        yield


def measure(pairs: int, pages: Pages) -> tuple[dict[str, list[float]], list[Cpu]]:
    """Measures watched and unwatched in turn, ``pairs`` times, after a first time that does not count.

    Also returns the CPU milliseconds per second of Chromium while the demo model answered.
    """
    found: dict[str, list[float]] = {"rate": [], "watched_rate": [], "cpu_us": [], "watched_cpu_us": []}
    cpu: list[Cpu] = []
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
                with watched(demo.url, pages, cpu):
                    row |= values(turn, "watched_")
                with watched(program.url, pages, []):
                    row["watched_cpu_us"] = cpu_us(server, program.url, STREAMS.streams, turn)
                print({name: round(value, 1) for name, value in row.items()}, flush=True)
                for name, value in row.items() if turn else ():
                    found[name].append(value)
    return found, cpu[1:]


def show_cpu(cpu: list[Cpu], empty: Cpu) -> None:
    for kind in sorted(cpu[0]):
        spread(f"CPU time of Chromium, {kind}", [each[kind] - empty.get(kind, 0) for each in cpu], "ms/s")
    spread("CPU time of Chromium", [sum(each.values()) - sum(empty.values()) for each in cpu], "ms/s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--tabs", type=int, default=0, help="pages in one window of Chromium instead of event streams")
    shown.add_argument("--windows", type=int, default=0, help="the same, each in a window of its own")
    parser.add_argument("--watch", metavar="URL", help="watch a server until killed")
    parser.add_argument("--readers", type=int, default=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch is not None:
        asyncio.run(watch(arguments.watch, arguments.readers))
    pages = Pages(arguments.tabs or arguments.windows, windows=bool(arguments.windows))
    empty: Cpu = empty_page() if pages.count else {}
    found, cpu = measure(arguments.pairs, pages)
    spread("tokens/s of the demo model, unwatched", found["rate"], "per s")
    spread("tokens/s of the demo model, watched", found["watched_rate"], "per s")
    spread("CPU per token, unwatched", found["cpu_us"], "us")
    spread("CPU per token, watched", found["watched_cpu_us"], "us")
    if cpu:
        show_cpu(cpu, empty)
    ratios = [one / other for one, other in zip(found["watched_rate"], found["rate"], strict=True)]
    spread("rate watched / unwatched", ratios, f"(promised: {PROMISED_RATIO})")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**found, "chromium": cpu, "chromium_empty": empty}, indent=1) + "\n")
    sys.exit(median(ratios) < PROMISED_RATIO)


if __name__ == "__main__":
    main()
