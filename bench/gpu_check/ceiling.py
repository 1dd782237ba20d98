"""What llama.cpp's own benchmarks make of the same files: no server, no text, and with one of them no sampling."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic import BaseModel, TypeAdapter

from bench.ceiling import read_line
from bench.gpu_check.models import Model, file_of, models
from bench.gpu_check.options import Options
from bench.gpu_check.program import run
from bench.gpu_check.record import Step
from bench.gpu_check.sweep import concurrency

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 128


class _Rate(BaseModel):
    """As llama-bench writes it: one test, prefill or decode."""

    n_prompt: int
    n_gen: int
    avg_ts: float
    stddev_ts: float


_RATES: TypeAdapter[list[_Rate]] = TypeAdapter(list[_Rate])


def steps(options: Options) -> list[Step]:
    """Both programs on every model."""
    return [
        Step(f"{program.__name__.strip('_')} {model.name}", "ceiling", partial(program, options, model), 20)
        for model in models(options)
        for program in (_llama_bench, _batched_bench)
    ]


def _llama_bench(options: Options, model: Model, deadline: float) -> Mapping[str, Any]:
    """Prefill of 512 tokens and decode of 128, one sequence; tokens a second."""
    command = [options.tools / "llama-bench", "-m", file_of(options, model), "-o", "json", "-fa", "1"]
    command += ["-p", "64" if options.small else "512", "-n", "16" if options.small else "128", *_layers(options)]
    rates = _RATES.validate_json(run(command, options.logs / f"llama-bench {model.name}.log", deadline))
    return {"rates": [rate.model_dump() for rate in rates]}


def _batched_bench(options: Options, model: Model, deadline: float) -> Mapping[str, Any]:
    """Every batch size of the sweep: seconds of prefill and of decode."""
    loads = concurrency(options)
    prompt, output = (32, 16) if options.small else (PROMPT_TOKENS, OUTPUT_TOKENS)
    command = [options.tools / "llama-batched-bench", "-m", file_of(options, model), "-no-kvu", "-fa", "on"]
    command += ["-npp", str(prompt), "-ntg", str(output), "-npl", ",".join(map(str, loads)), *_layers(options)]
    command += ["-c", str(max(loads) * (prompt + output)), "--output-format", "jsonl"]
    said = run(command, options.logs / f"llama-batched-bench {model.name}.log", deadline)
    return {"batches": [read_line(line).model_dump() for line in said.splitlines() if line.startswith("{")]}


def _layers(options: Options) -> list[str]:
    return ["-ngl", "0" if options.cpu else "99"]
