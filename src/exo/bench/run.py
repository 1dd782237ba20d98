"""Runs one benchmark."""

import os
import platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import count

import anyio

import exo
from exo.bench.client import Client, Exchange
from exo.bench.load import Interruption, arrivals, closed_loop, open_loop
from exo.bench.options import BenchOptions
from exo.bench.prompts import Prompts, body
from exo.bench.reading import read
from exo.bench.report import LoadResult, Report, Stage
from exo.bench.statistics import long_prompt, summarize
from exo.exit_code import CommandError, ExitCode

Note = Callable[[str], None]


def run_bench(options: BenchOptions, note: Note = lambda _: None) -> Report:
    """Measures stage by stage, and passes each stage's name to ``note``.

    Raises CommandError if the URL is invalid or a warm-up request fails. Later failures are counted in the report.
    """
    return anyio.run(measure, options, note, backend_options={"use_uvloop": True})


async def measure(options: BenchOptions, note: Note) -> Report:
    client = Client(options)
    loads = [LoadResult(concurrency=None, rate=rate) for rate in options.rates]
    loads = loads or [LoadResult(concurrency=each, rate=None) for each in options.concurrency]
    return Report(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        exo_version=exo.__version__,
        client=f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical CPUs",
        options=options,
        stages=tuple([await _stage(client, options, load, note) for load in loads]),
    )


async def _stage(client: Client, options: BenchOptions, load: LoadResult, note: Note) -> Stage:
    name = f"rate {load.rate:g}" if load.rate is not None else f"concurrency {load.concurrency}"
    prompts = Prompts(options, name)
    if options.warmup:
        note(f"{name}: warming up")
        await _warm_up(client, options, prompts)
    note(f"{name}: measuring")
    if options.workload == "long-prompt":
        return await _interrupted(client, options, load, prompts)
    requests = options.count(load.concurrency, load.rate)
    bodies = [body(options, next(prompts), number, options.output_tokens) for number in range(requests)]
    if load.rate is not None:
        due = arrivals(requests, load.rate, options.seed)
        exchanges = await open_loop(client, bodies, due, options.time_limit)
    else:
        exchanges = await closed_loop(client, bodies, load.concurrency or 1, options.time_limit)
    return summarize(load, [read(exchange) for exchange in exchanges], options.objective)


async def _warm_up(client: Client, options: BenchOptions, prompts: Prompts) -> None:
    for number in range(options.warmup):
        exchange = Exchange(body(options, next(prompts), number, options.output_tokens))
        with anyio.move_on_after(options.time_limit):
            await client.send(exchange)
        outcome = read(exchange)
        if outcome.cut:
            raise CommandError(f"the first reply took longer than the time limit of {options.time_limit:g} s")
        if outcome.fault is not None:
            code = ExitCode.UNREACHABLE if outcome.fault.kind == "connection" else ExitCode.FAILED
            raise CommandError(f"{options.url}: {outcome.fault.kind}: {outcome.fault.message}", code)


async def _interrupted(client: Client, options: BenchOptions, load: LoadResult, prompts: Prompts) -> Stage:
    def bodies() -> Iterator[bytes]:
        for number in count(1):
            yield body(options, next(prompts), number, options.stream_tokens)

    interruption = Interruption()
    long = body(options, prompts.long(), 0, options.output_tokens)
    await interruption.run(client, bodies(), load.concurrency or 1, long, options.time_limit)
    streams = [read(exchange) for exchange in interruption.streams]
    if interruption.long is None:
        return summarize(load, streams, options.objective)
    outcome = read(interruption.long)
    found = long_prompt(streams, outcome) if outcome.times else None
    return summarize(load, [*streams, outcome], options.objective, found)
