"""What the server path costs: the fake runner through ``exo serve``, a bare FastAPI stream, and the runner by itself.

``python -m bench.server_path [--pairs N] [--json FILE]``. Tokens a second over 64 connections, the client included, on
two cores; how much later the first token comes through the server than from the runner's pipe; and the processor time
that the server takes for each token of streams at an engine's pace, which on a CPU is taken from the engine. All take
turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Self

import psutil

from bench.mlx_server import free_port, running
from exo.bench.options import Options
from exo.bench.prompts import Prompts
from exo.bench.report import Stage
from exo.bench.run import run_bench
from exo.worker.protocol.messages import Command, Deltas, Event, Finished, Generate, Load, SamplingParams, Status, Text
from exo.worker.protocol.wire import decode_event, encode
from tests.support.fake_runner import COMMAND
from tests.support.server import ServeProgram, write_card

CONNECTIONS, TOKENS = 64, 512
SINGLE_TOKENS, SINGLES = 4, 100
PACED_STEP_SECONDS, PACED_TOKENS = 1 / 60, 300
PACED_STREAMS = (1, 16)
PROMISED_RATE, PROMISED_MS = 15_000, 1.0


class DirectRunner:
    """The fake runner on a pipe of ours, with nothing between."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._requests = 0
        self._send(Load(model_id="test/fake", backend="LlamaCppCpu", table={"slots": CONNECTIONS}))
        while not (isinstance(event := self._read(), Status) and event.state == "Ready"):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def first_token(self, prompt: str) -> float:
        """Seconds from sending a request to its first token."""
        self._requests += 1
        began = time.perf_counter()
        sampling = SamplingParams(temperature=0, seed=0)
        request = Generate(
            id=str(self._requests),
            prompt=(Text(text=prompt),),
            sampling=sampling,
            max_tokens=SINGLE_TOKENS,
            ignore_eos=True,
        )
        self._send(request)
        while not isinstance(self._read(), Deltas):
            pass
        took = time.perf_counter() - began
        while not isinstance(self._read(), Finished):
            pass
        return took

    def _send(self, command: Command) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(encode(command))
        self._process.stdin.flush()

    def _read(self) -> Event:
        assert self._process.stdout is not None
        return decode_event(self._process.stdout.readline())


def options(
    url: str, *, connections: int, requests: int, tokens: int, seed: int, model: str = "test/fake", warmup: int = 1
) -> Options:
    """Short prompts, all of them different; every token counted."""
    return Options(
        url=url,
        model=model,
        concurrency=(connections,),
        requests=requests,
        output_tokens=tokens,
        prompt_words=10,
        warmup=warmup,
        seed=seed,
    )


def measured(asked: Options) -> Stage:
    """The one stage, in which every request has to have brought all its tokens."""
    (stage,) = run_bench(asked).stages
    expected = (asked.requests or 0) * asked.output_tokens
    assert stage.tokens.output == expected, stage.requests
    return stage


def rate(url: str, seed: int) -> float:
    """Streamed tokens a second over all connections."""
    asked = options(url, connections=CONNECTIONS, requests=CONNECTIONS, tokens=TOKENS, seed=seed)
    return measured(asked).output_tokens_per_second


def first_token_ms(url: str, seed: int) -> float:
    """Median milliseconds to the first token, one request after another."""
    asked = options(url, connections=1, requests=SINGLES, tokens=SINGLE_TOKENS, seed=seed)
    ttft = measured(asked).ttft
    assert ttft is not None
    return ttft.p50


def direct_ms(runner: DirectRunner, seed: int) -> float:
    """The same of the runner alone."""
    prompts = Prompts(options("direct", connections=1, requests=SINGLES, tokens=SINGLE_TOKENS, seed=seed), "direct")
    return 1000 * median(runner.first_token(next(prompts)) for _ in range(SINGLES))


def cpu_us(server: psutil.Process, url: str, streams: int, seed: int) -> float:
    """Microseconds of the server's processor time for each token of so many streams at once."""
    asked = options(
        url, connections=streams, requests=streams, tokens=PACED_TOKENS, seed=seed, model="test/paced", warmup=0
    )
    before = server.cpu_times()
    measured(asked)
    after = server.cpu_times()
    return 1e6 * (after.user + after.system - before.user - before.system) / (streams * PACED_TOKENS)


def spread(name: str, values: Sequence[float], unit: str) -> None:
    """Prints a median and its range."""
    print(f"{name:<48}{median(values):9.2f} {unit}, {min(values):.2f} to {max(values):.2f}", flush=True)


def measure(pairs: int) -> dict[str, list[float]]:
    """Everything in turn, ``pairs`` times, after a first time that does not count."""
    names = ("rate", "bare_rate", "direct_ms", "served_ms", "bare_ms", *(f"cpu_us_{n}" for n in PACED_STREAMS))
    found: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as open_:
        home = Path(open_.enter_context(tempfile.TemporaryDirectory()))
        write_card(home, "fake", {"cuda": {"slots": CONNECTIONS}})
        write_card(home, "paced", {"cuda": {"slots": CONNECTIONS, "step_seconds": PACED_STEP_SECONDS}})
        program = open_.enter_context(ServeProgram(home, fake=True))
        served, server = program.url, psutil.Process(program.process.pid)
        bare = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "bench.bare_stream", str(port)]
        open_.enter_context(running(command, bare, dict(os.environ)))
        runner = open_.enter_context(DirectRunner())
        for pair in range(pairs + 1):
            values = (
                rate(served, pair),
                rate(bare, pair),
                direct_ms(runner, pair),
                first_token_ms(served, pair),
                first_token_ms(bare, pair),
                *(cpu_us(server, served, streams, pair) for streams in PACED_STREAMS),
            )
            for results, value in zip(found.values(), values, strict=True):
                results += [value] if pair else []
    return found


def show(found: dict[str, list[float]]) -> None:
    """The figures, and beside them what is promised."""
    cores = len(os.sched_getaffinity(0))
    print(f"{CONNECTIONS} connections, {TOKENS} tokens each, {cores} cores, {len(found['rate'])} pairs")
    spread(f"exo serve (promised {PROMISED_RATE})", found["rate"], "tokens/s")
    spread("bare FastAPI stream", found["bare_rate"], "tokens/s")
    ratios = [ours / bare for ours, bare in zip(found["rate"], found["bare_rate"], strict=True)]
    spread("  of it", ratios, "times")
    spread("first token from the runner's pipe", found["direct_ms"], "ms")
    spread("first token through exo serve", found["served_ms"], "ms")
    added = [served - direct for served, direct in zip(found["served_ms"], found["direct_ms"], strict=True)]
    spread(f"  added (promised {PROMISED_MS:g})", added, "ms")
    spread("first chunk of the bare FastAPI stream", found["bare_ms"], "ms")
    for streams in PACED_STREAMS:
        name = f"server's processor time a token, {streams} x {1 / PACED_STEP_SECONDS:g}/s"
        spread(name, found[f"cpu_us_{streams}"], "us")


def main() -> None:
    """Measures on two cores, or on the one there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures of every pair there")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    found = measure(arguments.pairs)
    show(found)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
