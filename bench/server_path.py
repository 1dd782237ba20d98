"""Measures the cost of the server: the fake runner through ``exo serve``, a bare FastAPI stream, the runner by itself.

``python -m bench.server_path [--pairs N] [--json FILE]`` prints the time and memory of a start; tokens per second over
64 connections, client included, on two cores; the delay of the first token behind the runner's pipe; and the server's
CPU time per token of streams at an engine's pace, which the engine on a CPU lacks. All take turns.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import psutil
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from bench.direct_runner import DirectRunner
from bench.servers import MeasuredServer, free_address
from exo.bench.options import BenchOptions
from exo.bench.prompts import Prompts
from exo.bench.report import Stage
from exo.bench.run import run_bench
from exo.worker.protocol.commands import Load
from tests.support.fake_runner import COMMAND
from tests.support.server import ServeProgram, write_card

CONNECTIONS, TOKENS = 64, 512
SINGLE_TOKENS, SINGLES = 4, 100
PACED_STEP_SECONDS, PACED_TOKENS = 1 / 60, 300
PACED_STREAMS = (1, 16)
STARTS = 5
PROMISED_RATE, PROMISED_MS = 15_000, 1.0


_CHUNK = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1795000000,'
    b'"model":"test/fake","system_fingerprint":"fake-1-LlamaCppCpu-0123456789abcdef",'
    b'"choices":[{"index":0,"text":"e","finish_reason":null}],"usage":null}\n\n'
)
"""A chunk as long as those of exo."""


class BareRequest(BaseModel):
    """The field of a completion request that the bare server reads."""

    max_tokens: int


def serve_bare(port: int) -> None:
    """Serves made-up chunks as fast as FastAPI can: the limit of the framework."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        return {"status": "ok"}

    @app.post("/v1/completions")
    async def complete(wanted: BareRequest) -> StreamingResponse:  # pyright: ignore[reportUnusedFunction]
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(wanted.max_tokens):
                yield _CHUNK
                await asyncio.sleep(0)  # the other streams' turns
            yield b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d}}\n\n' % wanted.max_tokens
            yield b"data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    uvicorn.run(app, port=port, log_level="warning", loop="uvloop", http="httptools")


def options(
    url: str, *, connections: int, requests: int, tokens: int, seed: int, model: str = "test/fake", warmup: int = 1
) -> BenchOptions:
    return BenchOptions(
        url=url,
        model=model,
        concurrency=(connections,),
        requests=requests,
        output_tokens=tokens,
        prompt_words=10,
        warmup=warmup,
        seed=seed,
    )


def measured(asked: BenchOptions) -> Stage:
    """The only stage. Every request must have all its tokens."""
    (stage,) = run_bench(asked).stages
    expected = (asked.requests or 0) * asked.output_tokens
    assert stage.tokens.output == expected, stage.requests
    return stage


def rate(url: str, seed: int) -> float:
    """Streamed tokens per second over all connections."""
    asked = options(url, connections=CONNECTIONS, requests=CONNECTIONS, tokens=TOKENS, seed=seed)
    return measured(asked).output_tokens_per_second


def first_token_ms(url: str, seed: int) -> float:
    """The median time to the first token in milliseconds, of sequential requests."""
    asked = options(url, connections=1, requests=SINGLES, tokens=SINGLE_TOKENS, seed=seed)
    ttft = measured(asked).ttft
    assert ttft is not None
    return ttft.p50


def direct_ms(runner: DirectRunner, seed: int) -> float:
    """The same for the runner alone."""
    prompts = Prompts(options("direct", connections=1, requests=SINGLES, tokens=SINGLE_TOKENS, seed=seed), "direct")
    streams = (runner.generate(next(prompts), SINGLE_TOKENS) for _ in range(SINGLES))
    return 1000 * median(stream.times[0] - stream.sent for stream in streams)


def cpu_us(server: psutil.Process, url: str, streams: int, seed: int) -> float:
    """The server's CPU time per token in microseconds, with ``streams`` at once."""
    asked = options(
        url, connections=streams, requests=streams, tokens=PACED_TOKENS, seed=seed, model="test/paced", warmup=0
    )
    before = server.cpu_times()
    measured(asked)
    after = server.cpu_times()
    return 1e6 * (after.user + after.system - before.user - before.system) / (streams * PACED_TOKENS)


def spread(name: str, values: Sequence[float], unit: str) -> None:
    print(f"{name:<48}{median(values):9.2f} {unit}, {min(values):.2f} to {max(values):.2f}", flush=True)


def start_up(home: Path) -> tuple[float, float]:
    """Seconds from a start without models to the first answer, and the server's memory in MB."""
    began = time.perf_counter()
    with ServeProgram(home) as program:
        program.client.get("/health").raise_for_status()
        return time.perf_counter() - began, psutil.Process(program.process.pid).memory_info().rss / 1e6


def measure(pairs: int) -> dict[str, list[float]]:
    """Measures everything in turn, ``pairs`` times, after a first time that does not count."""
    names = ("rate", "bare_rate", "direct_ms", "served_ms", "bare_ms", *(f"cpu_us_{n}" for n in PACED_STREAMS))
    found: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as open_:
        home = Path(open_.enter_context(tempfile.TemporaryDirectory()))
        starts = [start_up(home / "start") for _ in range(STARTS)]
        found |= {"start_s": [seconds for seconds, _ in starts], "start_mb": [memory for _, memory in starts]}
        write_card(home, "fake", {"cuda": {"slots": CONNECTIONS}})
        write_card(home, "paced", {"cuda": {"slots": CONNECTIONS, "step_seconds": PACED_STEP_SECONDS}})
        program = open_.enter_context(ServeProgram(home, fake=True))
        served, server = program.url, psutil.Process(program.process.pid)
        bare, port = free_address()
        command = [sys.executable, "-m", "bench.server_path", "--bare", port]
        open_.enter_context(MeasuredServer("bare", "", command, bare, "", "/health").running(home / "bare.log"))
        runner = open_.enter_context(
            DirectRunner(COMMAND, Load(model_id="test/fake", backend="LlamaCppCpu", table={"slots": CONNECTIONS}))
        )
        for pair in range(pairs + 1):
            values = (
                rate(served, pair),
                rate(bare, pair),
                direct_ms(runner, pair),
                first_token_ms(served, pair),
                first_token_ms(bare, pair),
                *(cpu_us(server, served, streams, pair) for streams in PACED_STREAMS),
            )
            for name, value in zip(names, values, strict=True):
                found[name] += [value] if pair else []
    return found


def show(found: dict[str, list[float]]) -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"{CONNECTIONS} connections, {TOKENS} tokens each, {cores} cores, {len(found['rate'])} pairs")
    spread("start to the first answer of /health", found["start_s"], "s")
    spread("the server's memory then", found["start_mb"], "MB")
    spread(f"exo serve (promised {PROMISED_RATE})", found["rate"], "tokens/s")
    spread("bare FastAPI stream", found["bare_rate"], "tokens/s")
    ratios = [ours / bare for ours, bare in zip(found["rate"], found["bare_rate"], strict=True)]
    spread("  exo serve over it", ratios, "times")
    spread("first token from the runner's pipe", found["direct_ms"], "ms")
    spread("first token through exo serve", found["served_ms"], "ms")
    added = [served - direct for served, direct in zip(found["served_ms"], found["direct_ms"], strict=True)]
    spread(f"  added (promised {PROMISED_MS:g})", added, "ms")
    spread("first chunk of the bare FastAPI stream", found["bare_ms"], "ms")
    for streams in PACED_STREAMS:
        name = f"server's CPU time per token, {streams} x {1 / PACED_STEP_SECONDS:g}/s"
        spread(name, found[f"cpu_us_{streams}"], "us")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.server_path", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures of every pair to this file")
    parser.add_argument("--bare", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare is not None:
        serve_bare(arguments.bare)
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    found = measure(arguments.pairs)
    show(found)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
