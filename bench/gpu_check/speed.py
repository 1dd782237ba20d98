"""Measures exo, a tuned llama-server of the same build, and llama.cpp's own benchmark on the same files."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx
from pydantic import JsonValue

from bench.gpu_check.models import CheckedModel, file_of, models
from bench.gpu_check.options import Options
from bench.gpu_check.record import CheckError, CheckStep, run
from bench.peer_report import SAMPLED, read_line
from bench.servers import MeasuredServer, exo_server, free_address
from exo.bench.options import BenchOptions
from exo.bench.run import run_bench
from exo.exit_code import CommandError
from exo.worker.runner_cuda.plugin import LIBRARY, read_plugin
from tests.support.server import write_card

EXO, LLAMA_SERVER, BATCHED_BENCH = "exo", "llama-server", "llama-batched-bench"
_LOAD_SECONDS, _STEP_SECONDS, _LEAST_SECONDS = 60.0, 45.0, 15.0
_CARD = "gpu-check"


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that both servers get. The largest number of ``streams`` is also the number of slots."""

    stage: str
    model: CheckedModel
    streams: tuple[int, ...]
    prompt_words: int
    prompt_tokens: int
    """About; for llama-batched-bench."""
    output_tokens: int
    context: int
    """Tokens of a slot."""
    requests: int | None = None
    """The requests for each number of streams; None: two for each stream, and at least eight."""
    sample_on_device: bool = False

    @property
    def name(self) -> str:
        return f"{self.stage} {self.model.name}"

    @property
    def slots(self) -> int:
        return max(self.streams)


def workloads(options: Options) -> list[Workload]:
    """The loads in the order in which they are measured."""
    chat = [Workload("sweep", each, (1, 8, 32, 64), 40, 138, 128, 1024) for each in models(options)]
    widest = max(chat, key=lambda each: each.model.shape.vocabulary)
    agent = Workload("agent", chat[0].model, (1, 4), 4630, 16_000, 256, 16_896, requests=4)
    every = [*chat, replace(widest, stage="sampling", sample_on_device=True), agent]
    if options.small:
        every = [replace(each, streams=(1, 2), output_tokens=16, context=1024) for each in every]
        every[-1] = replace(every[-1], prompt_words=200, prompt_tokens=736)
    return every


def steps(options: Options) -> list[CheckStep]:
    """Each load on exo, on llama-server and, unless only the sampling differs, in llama.cpp's benchmark."""
    found: list[CheckStep] = []
    for load in workloads(options):
        measured: dict[str, Callable[[float], Mapping[str, Any]]] = {
            EXO: partial(_serve, options, load, EXO),
            LLAMA_SERVER: partial(_serve, options, load, LLAMA_SERVER),
        }
        if not load.sample_on_device:
            measured[BATCHED_BENCH] = partial(_batched_bench, options, load)
        found += [CheckStep(name_of(load, each), load.stage, run, _LEAST_SECONDS) for each, run in measured.items()]
    return found


def name_of(load: Workload, program: str) -> str:
    return f"{load.name} {program}"


def _serve(options: Options, load: Workload, name: str, deadline: float) -> Mapping[str, Any]:
    server = (_exo if name == EXO else _llama_server)(options, load)
    options.logs.mkdir(parents=True, exist_ok=True)
    try:
        with server.running(options.logs / f"{name_of(load, name)}.log"):
            _load(server, deadline)
            left = min(_STEP_SECONDS, deadline - time.monotonic())
            asked = BenchOptions(
                url=server.url,
                model=server.model,
                concurrency=load.streams,
                prompt_words=load.prompt_words,
                output_tokens=load.output_tokens,
                requests=load.requests,
                time_limit=max(1.0, left / len(load.streams)),
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


def _load(server: MeasuredServer, deadline: float) -> None:
    """Requests a first token, for which exo loads the model. Raises CheckError."""
    asked = {"model": server.model, "prompt": "one", "max_tokens": 1}
    limit = max(1.0, min(_LOAD_SECONDS, deadline - time.monotonic()))
    try:
        answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=limit)
    except httpx.HTTPError as error:
        raise CheckError(f"{server.name} gives no first token: {type(error).__name__} {error}") from None
    if answer.status_code != 200:
        raise CheckError(f"{server.name} gives no first token: {answer.status_code} {answer.text[-1000:]}")


def _exo(options: Options, load: Workload) -> MeasuredServer:
    home = options.work / "exo" / load.name
    table: dict[str, JsonValue] = {"path": str(file_of(options, load.model)), "slots": load.slots}
    table |= {"n_ctx": load.context, "flash_attn": "on", "backend_sampling": "on" if load.sample_on_device else "off"}
    write_card(home, _CARD, {"cuda": table}, backends=[options.backend])
    return exo_server(home, f"{_CARD}@cuda", ready="/health")


def _llama_server(options: Options, load: Workload) -> MeasuredServer:
    """With a split KV cache and flash attention as in exo; its defaults would favour exo."""
    url, port = free_address()
    command = [str(options.programs / "llama-server"), "-m", str(file_of(options, load.model)), "--port", port]
    command += ["--no-ui", "-np", str(load.slots), "-no-kvu", "-c", str(load.slots * load.context), "-fa", "on"]
    command += [*_layers(options), *(["-bs"] if load.sample_on_device else [])]
    return MeasuredServer(LLAMA_SERVER, "", command, url, load.model.name, "/health", environment=_environment(options))


def _batched_bench(options: Options, load: Workload, deadline: float) -> Mapping[str, Any]:
    """The seconds of prefill and decode with every number of streams. Raises CheckError if one is missing."""
    command = [options.programs / BATCHED_BENCH, "-m", file_of(options, load.model), "-no-kvu", "-fa", "on"]
    command += ["-npp", str(load.prompt_tokens), "-ntg", str(load.output_tokens), "--output-format", "jsonl"]
    # It may end before it has written its last line, so the last line repeats the first.
    sizes = (*load.streams, load.streams[0])
    command += ["-npl", ",".join(map(str, sizes)), "-c", str(load.slots * load.context), *_layers(options)]
    deadline = min(deadline, time.monotonic() + _STEP_SECONDS)
    said = run(command, options.logs / f"{name_of(load, BATCHED_BENCH)}.log", deadline, _environment(options))
    batches = [read_line(line) for line in said.splitlines() if line.startswith("{")][: len(load.streams)]
    facts = {"batches": [batch.model_dump() for batch in batches]}
    if [batch.streams for batch in batches] != list(load.streams):
        raise CheckError(f"{BATCHED_BENCH} has not measured all of {load.streams}", facts)
    return facts


def _layers(options: Options) -> list[str]:
    """A device that there is not is an error; without a name, llama.cpp would use the CPU."""
    return ["-ngl", "0"] if options.cpu else ["-ngl", "99", "-dev", "CUDA0"]


def _environment(options: Options) -> Mapping[str, str]:
    """The variables by which llama.cpp's programs find the plug-in and CUDA's libraries."""
    if options.cpu:
        return {}
    plugin = read_plugin(options.plugin)
    assert plugin is not None, "the step plug-in has described it"
    folders = os.pathsep.join([*plugin.libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    return {"GGML_BACKEND_PATH": str(options.plugin / LIBRARY), "LD_LIBRARY_PATH": folders}
