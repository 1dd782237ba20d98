"""Measures exo, a tuned llama-server of the same build, and llama.cpp's own benchmarks on the same files."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import httpx
from pydantic import BaseModel, JsonValue, TypeAdapter

from bench.gpu_check.models import Model, file_of, models
from bench.gpu_check.options import Options
from bench.gpu_check.record import CheckError, Step, run
from bench.peer_report import SAMPLED, read_line
from bench.servers import Server, exo_server, free_address
from exo.bench.options import BenchOptions
from exo.bench.run import run_bench
from exo.exit_code import CommandError
from tests.support.server import write_card

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
SMALL_CONCURRENCY = (1, 2)
LLAMA_SERVER, BACKEND_SAMPLING = "llama-server", "llama-server -bs"
SERVERS = ("exo", LLAMA_SERVER, BACKEND_SAMPLING)
SETTINGS = {"exo, sampling on": "on"}
"""exo with ``backend_sampling``, which is off by default; for the model with the largest vocabulary."""
_LOAD_SECONDS, _STEP_SECONDS, _LEAST_SECONDS = 120.0, 150.0, 75.0
_CARD = "gpu-check"
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 128


class _Rate(BaseModel):
    """The format of llama-bench: one test, prefill or decode."""

    n_prompt: int
    n_gen: int
    avg_ts: float
    stddev_ts: float


_RATES: TypeAdapter[list[_Rate]] = TypeAdapter(list[_Rate])


def steps(options: Options) -> list[Step]:
    """Every server on every model, exo with other settings, then llama.cpp's benchmarks."""
    widest = max(models(options), key=lambda model: model.shape.vocabulary)
    pairs = [(model, server) for model in models(options) for server in SERVERS]
    sweeps = [
        Step(name_of(model, server), "sweep", partial(_sweep, options, model, server), _LEAST_SECONDS)
        for model, server in (*pairs, *((widest, setting) for setting in SETTINGS))
    ]
    programs = {"llama_bench": _llama_bench, "batched_bench": _batched_bench}
    return sweeps + [
        Step(f"{name} {model.name}", "ceiling", partial(program, options, model), 20)
        for model in models(options)
        for name, program in programs.items()
    ]


def name_of(model: Model, server: str) -> str:
    return f"sweep {model.name} {server}"


def concurrency(options: Options) -> tuple[int, ...]:
    """Requests in flight, one load per number. The last is also the number of slots."""
    return SMALL_CONCURRENCY if options.small else CONCURRENCY


def _sweep(options: Options, model: Model, name: str, deadline: float) -> Mapping[str, Any]:
    server = _llama_server(options, model, name)
    if name == "exo" or name in SETTINGS:
        server = _exo(options, model, SETTINGS.get(name, "off"))
    loads = concurrency(options)
    options.logs.mkdir(parents=True, exist_ok=True)
    try:
        with server.running(options.logs / f"{name_of(model, name)}.log"):
            _load(server, deadline)
            left = min(_STEP_SECONDS, deadline - time.monotonic())
            asked = BenchOptions(
                url=server.url,
                model=server.model,
                concurrency=loads,
                prompt_words=40,
                output_tokens=16 if options.small else 128,
                time_limit=max(1.0, left / len(loads)),
                **SAMPLED,
            )
            report = run_bench(asked)
    except (SystemExit, CommandError) as error:
        raise CheckError(f"{name}: {error}") from None
    facts = {"flags": server.flags, "report": report.model_dump(mode="json")}
    for stage in report.stages:
        if stage.requests.errors or not stage.requests.whole:
            raise CheckError(f"{name}, {stage.load.concurrency} streams: {stage.requests}", facts)
    return facts


def _load(server: Server, deadline: float) -> None:
    """Requests a first token, for which exo loads the model. Raises CheckError."""
    asked = {"model": server.model, "prompt": "one", "max_tokens": 1}
    limit = max(1.0, min(_LOAD_SECONDS, deadline - time.monotonic()))
    try:
        answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=limit)
    except httpx.HTTPError as error:
        raise CheckError(f"{server.name} gives no first token: {type(error).__name__} {error}") from None
    if answer.status_code != 200:
        raise CheckError(f"{server.name} gives no first token: {answer.status_code} {answer.text[-1000:]}")


def _exo(options: Options, model: Model, sampling: str) -> Server:
    home = options.work / "exo" / model.name
    slots = max(concurrency(options))
    table: dict[str, JsonValue] = {"path": str(file_of(options, model)), "slots": slots, "n_ctx": model.context}
    table |= {"flash_attn": "on", "backend_sampling": sampling}
    write_card(home, _CARD, {"cuda": table}, backends=[options.backend])
    return exo_server(home, f"{_CARD}@cuda", ready="/health")


def _llama_server(options: Options, model: Model, name: str) -> Server:
    """With a split KV cache and flash attention as in exo; its defaults would favour exo."""
    slots = max(concurrency(options))
    url, port = free_address()
    command = [str(options.tools / "llama-server"), "-m", str(file_of(options, model)), "--port", port, "--no-ui"]
    command += ["-np", str(slots), "-no-kvu", "-c", str(slots * model.context), "-fa", "on"]
    command += ["-ngl", "0" if options.cpu else "99", *(["-bs"] if name == BACKEND_SAMPLING else [])]
    return Server("llama-server", "", command, url, model.name, "/health")


def _llama_bench(options: Options, model: Model, deadline: float) -> Mapping[str, Any]:
    """Prefill of 512 tokens and decode of 128 with one sequence, in tokens per second."""
    command = [options.tools / "llama-bench", "-m", file_of(options, model), "-o", "json", "-fa", "1"]
    command += ["-p", "64" if options.small else "512", "-n", "16" if options.small else "128", *_layers(options)]
    rates = _RATES.validate_json(run(command, options.logs / f"llama-bench {model.name}.log", deadline))
    return {"rates": [rate.model_dump() for rate in rates]}


def _batched_bench(options: Options, model: Model, deadline: float) -> Mapping[str, Any]:
    """The seconds of prefill and decode at every batch size of the sweep."""
    loads = concurrency(options)
    prompt, output = (32, 16) if options.small else (PROMPT_TOKENS, OUTPUT_TOKENS)
    command = [options.tools / "llama-batched-bench", "-m", file_of(options, model), "-no-kvu", "-fa", "on"]
    command += ["-npp", str(prompt), "-ntg", str(output), "-npl", ",".join(map(str, loads)), *_layers(options)]
    command += ["-c", str(max(loads) * (prompt + output)), "--output-format", "jsonl"]
    said = run(command, options.logs / f"llama-batched-bench {model.name}.log", deadline)
    return {"batches": [read_line(line).model_dump() for line in said.splitlines() if line.startswith("{")]}


def _layers(options: Options) -> list[str]:
    return ["-ngl", "0" if options.cpu else "99"]
