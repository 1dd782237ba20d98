"""Checks on the GPU: the contract tests, agreement with the CPU, and whether layers are where they should be."""

import re
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio
from pydantic import JsonValue

from bench.gpu_check.models import Model, file_of, models
from bench.gpu_check.options import ROOT, Options
from bench.gpu_check.record import CheckError, Step, run
from exo.compare.comparison import Comparison
from exo.compare.engine import ComparedEngine
from exo.compare.run import CompareOptions, Subject, examine
from exo.worker.protocol.commands import Load
from exo.worker.protocol.one_shot import Probe
from exo.worker.protocol.runners import RUNNERS
from exo.worker.supervisor.host_probe import probe_host
from exo.worker.supervisor.pool import runner_commands
from tests.conftest import fake_card
from tests.support.program import Program, ask, runner_command
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.shape import ARCHITECTURES, Architecture

_CONTRACT = ROOT / "tests" / "contract"
_BACKEND_VARIABLE = "EXO_TEST_LLAMA_BACKEND"
"""The back end that tests/contract tests."""
_MAX_ABS = 0.05
"""Nats. A GPU multiplies float32 matrices of small batches with factors rounded to 10 bits (TF32). That changes a logit
of these models, whose standard deviation is 4, by a few thousandths; an arithmetic error changes it by whole nats."""
_KL_MEAN = 1e-4
_TOP1 = 0.98
_MODULE = RUNNERS["cuda"].module
_ALL_LAYERS_SHARE = 0.85
"""The least share of the weights that all layers take on the GPU. llama.cpp keeps the input embedding in RAM."""
_NO_LAYER_SHARE = 0.15
"""The largest share with no layer there. A process that only queries the GPU takes some of its memory."""


def steps(options: Options) -> list[Step]:
    """A step for the contract tests, one per architecture, and one for the offload of layers."""
    return [
        Step("contract", "contract", partial(_test, options), 60),
        *(Step(f"parity {each}", "parity", partial(_compare, options, each), 20) for each in ARCHITECTURES),
        Step("offload", "offload", partial(_check_offload, options, models(options)[0]), 30),
    ]


def _test(options: Options, deadline: float) -> Mapping[str, Any]:
    command = [options.python, "-m", "pytest", "-p", "no:cacheprovider", "-k", "cuda", "--rootdir", ROOT]
    said = run([*command, _CONTRACT], options.logs / "contract.log", deadline, {_BACKEND_VARIABLE: options.backend})
    return {"backend": options.backend, "tests": counted(said)}


def counted(said: str) -> dict[str, int]:
    """The counts in pytest's last line. Raises CheckError if no test has passed."""
    last = said.strip().splitlines()[-1] if said.strip() else ""
    counts = {ending: int(count) for count, ending in re.findall(r"(\d+) (passed|failed|skipped|deselected)", last)}
    if not counts.get("passed"):
        raise CheckError(f"pytest ran no test: {last}")
    return counts


def _compare(options: Options, architecture: Architecture, deadline: float) -> Mapping[str, Any]:
    path = options.work / "models" / f"twin-{architecture}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(path, Shape(architecture))
    exact: dict[str, JsonValue] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "slots": 1}
    table: dict[str, JsonValue] = {"path": str(path), **exact}
    command = runner_commands()["cuda"]
    on_cpu = Load(model_id="test/twin", backend="LlamaCppCpu", table={**table, "threads": 1})
    checked = Load(model_id="test/twin", backend=options.backend, table={**table, "threads": 2})
    engines = ComparedEngine("CPU", tuple(command), on_cpu), ComparedEngine("checked", tuple(command), checked)

    async def compare() -> Comparison:
        with anyio.fail_after(deadline - time.monotonic()):
            host = await probe_host({})
            return await examine(Subject(fake_card(), host), engines, CompareOptions(), options.logs, lambda _: None)

    return _judged(anyio.run(compare))


def _judged(found: Comparison) -> Mapping[str, Any]:
    """The main figures of a comparison. Raises CheckError if rounding does not explain the differences."""
    (pair,) = found.pairs
    divergence, greedy = pair.divergence, pair.greedy
    worst = max((each.margin for each in (*greedy.differences, *pair.seeded.differences)), default=0.0)
    facts = {
        "devices": [list(engine.devices) for engine in found.engines],
        "max_abs": divergence.max_abs,
        "mean_abs": divergence.mean_abs,
        "kl_mean": divergence.kl_mean,
        "top1_agreement": divergence.top1_agreement,
        "greedy": f"{greedy.identical} of {greedy.sequences} identical",
        "seeded": f"{pair.seeded.identical} of {pair.seeded.sequences} identical",
        "largest_margin_of_a_difference": worst,
    }
    if (
        divergence.max_abs > _MAX_ABS
        or divergence.kl_mean > _KL_MEAN
        or divergence.top1_agreement < _TOP1
        or worst > 2 * _MAX_ABS
    ):
        limits = f"max_abs {_MAX_ABS}, kl_mean {_KL_MEAN}, top1_agreement {_TOP1}, margin {2 * _MAX_ABS}"
        raise CheckError(f"rounding does not explain the differences (bounds: {limits})", facts)
    return facts


def _check_offload(options: Options, model: Model, _deadline: float) -> Mapping[str, Any]:
    path = str(file_of(options, model))
    layers = {"all": -1, "half": model.shape.layer_count // 2, "none": 0}
    found: dict[str, Any] = {}
    for name, count in layers.items():
        found[name] = _load(options.backend, {"path": path, "n_ctx": 512, "slots": 2, "n_gpu_layers": count})
    facts = {"model": model.name, **found}
    if problem := verdict(found, options):
        raise CheckError(problem, facts)
    return facts


def _load(backend: str, table: dict[str, Any]) -> dict[str, Any]:
    """The GPU memory that a load takes in bytes, and the devices that the runner names."""
    before = _free()
    with Program(runner_command(_MODULE)) as program:
        capabilities = program.load(Load(model_id="test/offload", backend=backend, table=table))
        (result,) = program.generate(ask("offload"))
        taken = before - _free()
        said = {
            "devices": list(capabilities.devices),
            "model_bytes": capabilities.model_bytes,
            "taken_bytes": taken,
            "tokens": len(result.tokens),
        }
        program.shutdown()
    return said


def _free() -> int:
    """Free bytes on all CUDA devices, as llama.cpp states them."""
    done = subprocess.run([sys.executable, "-m", _MODULE, "--probe"], capture_output=True, check=True)
    devices = Probe.model_validate_json(done.stdout).devices
    return sum(device.memory_free for device in devices if device.backend == "LlamaCppCuda")


def verdict(found: Mapping[str, Mapping[str, Any]], options: Options) -> str:
    """The problem, or an empty text."""
    everything, half, nothing = found["all"], found["half"], found["none"]
    if any(each["tokens"] != 16 for each in found.values()):
        return "a load did not generate the 16 tokens that it was asked for"
    if nothing["devices"] != ["CPU"]:
        return f"with n_gpu_layers = 0 the runner names {nothing['devices']}"
    if options.cpu:
        return "" if everything["devices"] == ["CPU"] else f"on the CPU the runner names {everything['devices']}"
    if not any(device.startswith("CUDA") for device in everything["devices"]):
        return f"with all layers on the GPU the runner names {everything['devices']}"
    if options.small:
        return ""  # the driver takes more than a small model's weights
    size = everything["model_bytes"]
    if everything["taken_bytes"] < _ALL_LAYERS_SHARE * size:
        return f"all layers took {everything['taken_bytes']} bytes of the GPU, and the model has {size}"
    if nothing["taken_bytes"] > _NO_LAYER_SHARE * size:
        return f"no layer was to be on the GPU, but {nothing['taken_bytes']} bytes of it were taken"
    if not 0.3 < half["taken_bytes"] / everything["taken_bytes"] < 0.75:
        return f"half of the layers took {half['taken_bytes']} bytes, all of them {everything['taken_bytes']}"
    return ""
