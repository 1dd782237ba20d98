"""exo and a tuned llama-server of the same build, on the same files, asked by the same client at rising concurrency."""

import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import httpx
from pydantic import JsonValue

import exo
from bench.gpu_check.models import Model, file_of, models
from bench.gpu_check.options import Options
from bench.gpu_check.record import CheckError, Step
from bench.mlx_server import free_port
from bench.peer_servers import Server
from exo.bench.options import Options as Asked
from exo.bench.run import run_bench
from exo.exit_code import CommandError
from tests.support.server import write_card

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
SMALL_CONCURRENCY = (1, 2)
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
LLAMA_SERVER, BACKEND_SAMPLING = "llama-server", "llama-server -bs"
SERVERS = ("exo", LLAMA_SERVER, BACKEND_SAMPLING)
SETTINGS = {"exo, sampling on": "on"}
"""exo with ``backend_sampling`` set, which is off by itself; for the model with the most tokens."""
_LOAD_SECONDS, _STEP_SECONDS, _LEAST_SECONDS = 120.0, 150.0, 75.0
_CARD = "gpu-check"


def steps(options: Options) -> list[Step]:
    """Every server on every model, those of a model one after another; last what a setting makes of exo."""
    widest = max(models(options), key=lambda model: model.shape.vocabulary)
    pairs = [(model, server) for model in models(options) for server in SERVERS]
    return [
        Step(name_of(model, server), "sweep", partial(_sweep, options, model, server), _LEAST_SECONDS)
        for model, server in (*pairs, *((widest, setting) for setting in SETTINGS))
    ]


def name_of(model: Model, server: str) -> str:
    """Of the step."""
    return f"sweep {model.name} {server}"


def concurrency(options: Options) -> tuple[int, ...]:
    """Requests in flight, one load after another; the last is the number of slots, too."""
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
            asked = Asked(
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
    """A first token, for which exo loads the model. Raises CheckError."""
    asked = {"model": server.model, "prompt": "one", "max_tokens": 1}
    limit = max(1.0, min(_LOAD_SECONDS, deadline - time.monotonic()))
    try:
        answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=limit)
    except httpx.HTTPError as error:
        raise CheckError(f"{server.name} gives no first token: {type(error).__name__} {error}") from None
    if answer.status_code != 200:
        raise CheckError(f"{server.name} gives no first token: {answer.status_code} {answer.text[-1000:]}")


def _exo(options: Options, model: Model, sampling: str) -> Server:
    """``exo serve`` with a card for this model alone."""
    home = options.work / "exo" / model.name
    slots = max(concurrency(options))
    table: dict[str, JsonValue] = {"path": str(file_of(options, model)), "slots": slots, "n_ctx": model.context}
    table |= {"flash_attn": "on", "backend_sampling": sampling}
    write_card(home, _CARD, {"cuda": table}, backends=[options.backend])
    port = str(free_port())
    command = [sys.executable, "-m", "exo", "serve", "--port", port]
    url = f"http://127.0.0.1:{port}"
    return Server("exo", exo.__version__, command, url, f"{_CARD}@cuda", "/health", environment={"EXO_HOME": str(home)})


def _llama_server(options: Options, model: Model, name: str) -> Server:
    """With split KV and flash attention, which is what exo has; its defaults would flatter exo."""
    slots = max(concurrency(options))
    port = str(free_port())
    command = [str(options.tools / "llama-server"), "-m", str(file_of(options, model)), "--port", port, "--no-ui"]
    command += ["-np", str(slots), "-no-kvu", "-c", str(slots * model.context), "-fa", "on"]
    command += ["-ngl", "0" if options.cpu else "99", *(["-bs"] if name == BACKEND_SAMPLING else [])]
    return Server("llama-server", "", command, f"http://127.0.0.1:{port}", model.name, "/health")
