"""Measures what one user on one machine sees: a busy CPU, two models, single prompts, clients that leave.

``python -m bench.one_user [--pairs N] [--starts N] [--docs FOLDER]`` writes ``one_user.md``. exo and llama-server run
side by side with the demo model, and take turns. ``make bench-peers`` runs this after ``bench.peers``.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import httpx
import psutil

from bench.busy import Busy
from bench.peer_report import Scenario
from bench.peers import ask
from bench.servers import (
    DEMO_CARD,
    ROOT,
    MeasuredServer,
    commit,
    demo_model,
    demo_server,
    end_within,
    llama_server,
    set_up_peers,
)
from exo.bench.report import Stage

PAGE = "one_user.md"
STREAMS = (1, 4)
OUTPUT_TOKENS, FEW_TOKENS = 48, 12
"""Output tokens of each stream beside another process. The second number is for a very slow server."""
SECOND = "demo/second"
"""The second model: the same file with another name."""
LONG_CONTEXT, LONG_SLOTS = 12_288, 2
LONE = {
    f"lone prompt of {words:,} words": Scenario("", 1, (), {"requests": n, "prompt_words": words, "output_tokens": 8})
    for words, n in ((250, 3), (1000, 2), (3000, 1))
} | {
    "300 new words after 6,000 cached": Scenario(
        "",
        1,
        (),
        {"requests": 3, "workload": "shared-prefix", "shared_words": 6000, "prompt_words": 300, "output_tokens": 8},
    )
}
LONE_WARM_UP = Scenario("", 1, (), {"requests": 1, "prompt_words": 250, "output_tokens": 8})
IDLE_SECONDS = 60.0
_LIMIT_SECONDS = 3 * 3600.0

Row = tuple[str, str, Sequence[float], Sequence[float]]
"""Scenario, figure, exo's values pair by pair, and the values that they are compared with."""


def busy_turns(exo: MeasuredServer, llama: MeasuredServer, pair: int) -> Iterator[tuple[str, int, Stage]]:
    """One pair's turns on a quiet and on a busy machine: name, streams, results.

    llama-server beside a process of another session is measured in the first pair only.
    """
    own, shared = Busy(own_session=True).running, Busy(own_session=False).running
    turns = (
        ("exo, quiet", exo, nullcontext),
        ("exo, busy", exo, own),
        ("llama-server, quiet", llama, nullcontext),
        ("llama-server, busy in its session", llama, shared),
        *((("llama-server, busy in another session", llama, own),) if pair == 0 else ()),
    )
    for streams in STREAMS:
        for name, server, state in turns:
            tokens = FEW_TOKENS if name.endswith("another session") else OUTPUT_TOKENS
            scenario = Scenario(f"{name} {streams}", streams, (), {"requests": 2 * streams, "output_tokens": tokens})
            with state():
                stage = ask(server, scenario, pair, tiny=False)
            _print(pair, f"{name}, {streams}", stage)
            yield name, streams, stage


def busy_rows(exo: MeasuredServer, llama: MeasuredServer, pairs: int) -> Iterator[Row]:
    """Output rates and worst gaps beside another process."""
    rates: dict[tuple[str, int], list[float]] = {}
    gaps: dict[tuple[str, int], list[float]] = {}
    for pair in range(pairs):
        for name, streams, stage in busy_turns(exo, llama, pair):
            rates.setdefault((name, streams), []).append(stage.output_tokens_per_second)
            gaps.setdefault((name, streams), []).append(stage.itl.max if stage.itl else 0.0)
    for streams in STREAMS:
        scenario = f"another process computes, {streams} stream{'s'[: streams > 1]}"
        ours = rates["exo, busy", streams]
        yield scenario, "tokens/s, against exo on a quiet machine", ours, rates["exo, quiet", streams]
        for peer in ("llama-server, busy in its session", "llama-server, busy in another session"):
            theirs, their_gaps = rates[peer, streams], gaps[peer, streams]
            yield scenario, f"tokens/s, against {peer}", ours[: len(theirs)], theirs
            yield scenario, f"worst gap in ms, against {peer}", gaps["exo, busy", streams][: len(theirs)], their_gaps
        yield scenario, "worst gap in ms", gaps["exo, busy", streams], []
        yield (
            f"quiet, {streams} streams",
            "tokens/s",
            rates["exo, quiet", streams],
            rates["llama-server, quiet", streams],
        )


def two_models(home: Path, starts: int) -> Iterator[Row]:
    """A server with two models, restarted each time: one stream of each model against two streams of one."""
    server = _two_model_server(home)
    one: list[float] = []
    both: list[float] = []
    gaps: list[float] = []
    for start in range(starts):
        with server.running(home / "two-models.log"):
            usual = ask(server, Scenario("one model", 2, (), {"requests": 4}), start, tiny=False)
            single = Scenario("two models", 1, (), {"requests": 2})
            models = (server.model, f"{SECOND}@cuda")
            with ThreadPoolExecutor(len(models)) as threads:
                asked = [threads.submit(ask, replace(server, model=each), single, start, tiny=False) for each in models]
                stages = [each.result() for each in asked]
        one.append(usual.output_tokens_per_second)
        both.append(sum(each.output_tokens_per_second for each in stages))
        gaps.append(max(each.itl.max for each in stages if each.itl))
        rates = ", ".join(f"{each.output_tokens_per_second:.1f}" for each in stages)
        print(
            f"start {start}  one model {one[-1]:.1f}, two models {rates} tokens/s, worst gap {gaps[-1]:.0f} ms",
            flush=True,
        )
    yield "two models, one stream each", "tokens/s, against one model with two streams", both, one
    yield "two models, one stream each", "worst gap in ms", gaps, []


def lone_prompts(home: Path, pairs: int) -> Iterator[Row]:
    """The time to the first token of prompts that find the server idle.

    The same program with the same settings is up to a tenth faster or slower after another start, probably because its
    memory lies elsewhere. Each pair therefore starts both servers anew.
    """
    exo = demo_server(home / "long", (f"n_ctx = {LONG_CONTEXT}", f"slots = {LONG_SLOTS}"))
    llama = llama_server(LONG_SLOTS, LONG_CONTEXT)
    found: dict[tuple[str, str], list[float]] = {}
    for pair in range(pairs):
        with exo.running(home / "long.log"), llama.running(home / "llama-long.log"):
            for server in (exo, llama):
                ask(server, replace(LONE_WARM_UP, name="warm-up"), pair, tiny=False)
            for name, scenario in LONE.items():
                for server in (exo, llama) if pair % 2 else (llama, exo):
                    stage = ask(server, replace(scenario, name=name), pair, tiny=False)
                    _print(pair, f"{name}, {server.name}", stage)
                    found.setdefault((name, server.name), []).append(stage.ttft.p50 if stage.ttft else 0.0)
    for name in LONE:
        yield name, "ms to the first token, against llama-server", found[name, "exo"], found[name, "llama-server"]


def leaving_clients(home: Path, runs: int) -> Iterator[Row]:
    """One slot, whose client leaves in the middle of a prompt of some 2,000 tokens while the next request waits."""
    server = demo_server(home / "one-slot", ("slots = 1",))
    after: list[float] = []
    alone: list[float] = []
    with server.running(home / "one-slot.log"):
        for run in range(runs):
            body = {"model": server.model, "prompt": f"{run} " + "word " * 2000, "stream": True}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as reply:
                reply.raise_for_status()
                time.sleep(0.3 + 0.1 * run)
            for results in (after, alone):
                began, short = time.perf_counter(), {"model": server.model, "prompt": "The", "max_tokens": 1}
                httpx.post(f"{server.url}/v1/completions", json=short, timeout=60).raise_for_status()
                results.append(1000 * (time.perf_counter() - began))
    yield "a client leaves a prompt of 2,000 tokens", "ms to the next one's token, against an idle server", after, alone


def idle_share(home: Path) -> float:
    """The share of a core that a server with two models and no requests uses over a minute, with its runners."""
    server = _two_model_server(home)
    with server.running(home / "idle.log"):
        time.sleep(5)
        me = psutil.Process()
        family = [each for each in me.children(recursive=True) if each.is_running()]
        before, began = sum(map(_cpu_seconds, family)), time.monotonic()
        time.sleep(IDLE_SECONDS)
        return (sum(map(_cpu_seconds, family)) - before) / (time.monotonic() - began)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _two_model_server(home: Path) -> MeasuredServer:
    folder = home / "two-models"
    cards = folder / "custom_model_cards"
    if not cards.exists():
        cards.mkdir(parents=True)
        lines = DEMO_CARD.read_text().replace("google/gemma-3-270m", SECOND, 1).splitlines()
        lines = [line for line in lines if not line.startswith(("aliases", "repo = ", "file = "))]
        at = lines.index("[cuda]") + 1
        (cards / "second.toml").write_text(
            "\n".join([*lines[:at], f"path = {json.dumps(str(demo_model()))}", *lines[at:]])
        )
    server = demo_server(folder)
    return replace(server, command=[*server.command, "--load", SECOND])


def _print(pair: int, name: str, stage: Stage) -> None:
    first, gap = stage.ttft.p50 if stage.ttft else 0.0, stage.itl.max if stage.itl else 0.0
    rate = stage.output_tokens_per_second
    print(f"pair {pair}  {name:<50} {rate:7.1f} tokens/s, first {first:7.1f} ms, worst gap {gap:7.1f} ms", flush=True)


def page(rows: Sequence[Row], idle: float, pairs: int, starts: int) -> Iterator[str]:
    """The lines of the page. A ratio is exo's figure divided by the other, within each pair."""
    yield "# One user on one machine"
    yield ""
    yield (
        f"Written by `python -m bench.one_user` on {datetime.now(UTC):%Y-%m-%d} at commit {commit()}: the demo model, "
        f"{psutil.cpu_count(logical=False)} cores, {pairs} pairs, {starts} starts with two models. All servers "
        "run side by side and take turns. Figures are medians; the ratio is exo's figure over the other one's, taken "
        "within each pair, with its range in brackets."
    )
    yield ""
    yield "| scenario | figure | exo | the other | ratio |"
    yield "|---|---|---|---|---|"
    for scenario, figure, ours, theirs in rows:
        if theirs:
            ratios = [our / their if their else 0.0 for our, their in zip(ours, theirs, strict=True)]
            other, ratio = f"{median(theirs):.1f}", f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        else:
            other, ratio = "", f"{min(ours):.0f} to {max(ours):.0f}"
        yield f"| {scenario} | {figure} | {median(ours):.1f} | {other} | {ratio} |"
    yield ""
    yield f"With two models loaded and no requests, all processes together use {idle:.2%} of a core."


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.one_user", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--only", choices=["busy", "two", "lone", "leave", "idle"], help="one part; writes no page")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder of the page")
    arguments = parser.parse_args()
    rows: list[Row] = []
    idle, only = 0.0, arguments.only
    if only in (None, "busy", "lone"):
        set_up_peers()
    end_within(_LIMIT_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if only in (None, "busy"):
            servers = demo_server(home / "exo"), llama_server()
            with ExitStack() as running:
                for server in servers:
                    running.enter_context(server.running(home / f"{server.name}.log"))
                rows += busy_rows(*servers, arguments.pairs)
        if only in (None, "two"):
            rows += two_models(home, arguments.starts)
        if only in (None, "lone"):
            rows += lone_prompts(home, arguments.pairs)
        if only in (None, "leave"):
            rows += leaving_clients(home, 9)
        if only in (None, "idle"):
            idle = idle_share(home)
    lines = "\n".join(page(rows, idle, arguments.pairs, arguments.starts)) + "\n"
    print(lines)
    if only is None:
        arguments.docs.mkdir(parents=True, exist_ok=True)
        (arguments.docs / PAGE).write_text(lines)


if __name__ == "__main__":
    main()
