"""Measures what monitoring costs: servers that are watched and unwatched in turn.

``python -m bench.watched_path [--pairs N] [--tabs N | --windows N] [--json FILE]`` prints the rate of output of 16
streams of the demo model, and the CPU time per token of a server with the fake runner, whose 16 streams have an
engine's pace. Which turn of a pair comes first alternates. Watched means that another process scrapes ``/metrics``
once a second and reads ``/v1/activity/events`` twice, as two pages in browsers elsewhere do; unwatched means that
nothing does. With ``--tabs`` or ``--windows``, Chromium on this machine shows the page's view of requests that often
instead of the two readers, and in unwatched turns the same Chromium shows as many empty pages in the same way: the
ratio is what the scrapes and the page cost, not the browser. The difference of its CPU time is printed by type of
process. Of the tabs of one window only the last one is seen.
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
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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

STREAMS = Scenario("watched", 16, (), {"requests": 64})
SCRAPE_SECONDS = 1.0
PROMISED_RATIO = 0.98
EMPTY = "about:blank"
Cpu = dict[str, float]
"""Chromium's CPU milliseconds per second by the type of the process."""


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
    def shown(self, url: str, title: str, cpu: Cpu) -> Generator[None]:
        """Shows ``url`` in Chromium, whose CPU time goes to ``cpu``."""
        command = shutil.which("chromium") or shutil.which("google-chrome")
        command = command or sys.exit("Chromium is not installed; Debian's package is called chromium")
        with chromium(command, [url] * self.count, windows=self.windows, title=title) as browser:
            before, began = cpu_seconds(browser), time.monotonic()
            yield
            seconds = time.monotonic() - began
            cpu |= {kind: 1000 * (used - before.get(kind, 0)) / seconds for kind, used in cpu_seconds(browser).items()}


@contextmanager
def watched(url: str, pages: Pages, cpu: Cpu) -> Generator[None]:
    """Has other processes watch the server."""
    command = [sys.executable, "-m", "bench.watched_path", "--watch", url]
    command += ["--readers", str(0 if pages.count else 2)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, ExitStack() as closing:
        closing.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"
        if pages.count:
            closing.enter_context(pages.shown(f"{url}/#now", "Now \u00b7 exo", cpu))
        yield


def unwatched(pages: Pages, cpu: Cpu) -> AbstractContextManager[None]:
    """Has Chromium show empty pages if it shows pages in watched turns."""
    return pages.shown(EMPTY, EMPTY, cpu) if pages.count else nullcontext()


def measure(pairs: int, pages: Pages) -> tuple[dict[str, list[float]], list[Cpu]]:
    """Measures watched and unwatched in turn, ``pairs`` times, after a first time that does not count.

    Also returns what Chromium computes more in watched turns than in unwatched ones while the demo model answers.
    """
    found: dict[str, list[float]] = {"rate": [], "watched_rate": [], "cpu_us": [], "watched_cpu_us": []}
    more: list[Cpu] = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        paced = {"slots": STREAMS.streams, "n_ctx": 4096, "step_seconds": PACED_STEP_SECONDS}
        write_card(home, "paced", {"cuda": paced}, backends=["LlamaCppCpu"])
        demo = demo_server(home / "demo")
        with ServeProgram(home, fake=True) as program, demo.running(home / "demo.log"):
            server = psutil.Process(program.process.pid)
            for turn in range(pairs + 1):
                row: dict[str, float] = {}
                cpu: dict[str, Cpu] = {"": {}, "watched_": {}}
                for prefix in sorted(cpu, reverse=turn % 2 == 1):
                    with watched(demo.url, pages, cpu[prefix]) if prefix else unwatched(pages, cpu[prefix]):
                        stage = ask(demo, replace(STREAMS, name=f"{turn}{prefix}"), turn, tiny=False)
                    row[f"{prefix}rate"] = stage.output_tokens_per_second
                    with watched(program.url, pages, {}) if prefix else unwatched(pages, {}):
                        row[f"{prefix}cpu_us"] = cpu_us(server, program.url, STREAMS.streams, turn)
                print({name: round(value, 1) for name, value in row.items()}, flush=True)
                if turn:
                    more.append({kind: used - cpu[""].get(kind, 0) for kind, used in cpu["watched_"].items()})
                    for name, value in row.items():
                        found[name].append(value)
    return found, more


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
    found, more = measure(arguments.pairs, pages)
    spread("tokens/s of the demo model, unwatched", found["rate"], "per s")
    spread("tokens/s of the demo model, watched", found["watched_rate"], "per s")
    spread("CPU per token, unwatched", found["cpu_us"], "us")
    spread("CPU per token, watched", found["watched_cpu_us"], "us")
    if pages.count:
        for kind in sorted(more[0]):
            spread(f"CPU time of Chromium, {kind}, above empty pages", [each.get(kind, 0.0) for each in more], "ms/s")
        spread("CPU time of Chromium above empty pages", [sum(each.values()) for each in more], "ms/s")
    ratios = [one / other for one, other in zip(found["watched_rate"], found["rate"], strict=True)]
    spread("rate watched / unwatched", ratios, f"(promised: {PROMISED_RATIO})")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**found, "chromium_above_empty": more}, indent=1) + "\n")
    sys.exit(median(ratios) < PROMISED_RATIO)


if __name__ == "__main__":
    main()
