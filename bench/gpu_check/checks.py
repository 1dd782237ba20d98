"""Checks on the GPU: self-test, contract tests, agreement with the CPU, and where layers and memory are."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio
from pydantic import JsonValue

from bench.gpu_check.models import CheckedModel, file_of, models
from bench.gpu_check.options import ROOT, Options
from bench.gpu_check.record import CheckError, CheckStep, run
from exo.compare.comparison import Comparison
from exo.compare.engine import ComparedEngine
from exo.compare.run import CompareOptions, Subject, examine
from exo.setup.gpu_plugin import self_test
from exo.worker.protocol.commands import Estimate, Load
from exo.worker.protocol.probe import Probe
from exo.worker.protocol.runners import RUNNERS, runner_commands
from exo.worker.supervisor.host_probe import probe_host
from tests.conftest import fake_card
from tests.support.program import Program, ask, runner_command
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.shape import ARCHITECTURES

_CONTRACT = ROOT / "tests" / "contract"
_BACKEND_VARIABLE = "EXO_TEST_LLAMA_BACKEND"
"""The back end that tests/contract tests."""
_MAX_ABS = 0.05
"""Nats. A GPU multiplies float32 matrices of small batches with factors rounded to 10 bits (TF32). That changes a logit
of these models, whose standard deviation is 4, by a few thousandths; an arithmetic error changes it by whole nats."""
_KL_MEAN = 1e-4
_TEST_PROCESSES = 8
TWO_DEVICES = ("env", "GGML_CUDA_DEVICES=2")
"""What precedes a command whose CUDA shows the first GPU as two."""
_Table = Mapping[str, JsonValue]
_EXACT: _Table = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"}
_FLASH: _Table = {"cache_type_k": "f16", "cache_type_v": "f16", "flash_attn": "on"}
"""For a split by tensor, which needs flash attention, which has no float32 KV cache."""
_BY_LAYER: _Table = {"split_mode": "layer", "tensor_split": [1, 1]}
_BY_TENSOR: _Table = {"split_mode": "tensor"}
_SHARED = Shape("llama", layers=6, heads=4, kv_heads=4, head_dim=64)
"""Layers and heads for two devices. Flash attention knows heads of this size."""
_ESTIMATE_SLACK = 1.1
_TOP1 = 0.98
_MODULE = RUNNERS["cuda"].module
_ALL_LAYERS_SHARE = 0.85
"""The least share of the weights that all layers take on the GPU. llama.cpp keeps the input embedding in RAM."""
_NO_LAYER_SHARE = 0.15
"""The largest share with no layer there. A process that only queries the GPU takes some of its memory."""


def steps(options: Options) -> list[CheckStep]:
    """The self-test, the contract tests, a parity step per architecture, offload, and two devices made of one GPU."""
    model = models(options)[0]
    checks = [
        CheckStep("contract", "contract", partial(_test, options), 60),
        *(
            CheckStep(f"parity {each}", "parity", partial(_compare, options, Shape(each), _EXACT, None), 15)
            for each in ARCHITECTURES
        ),
        CheckStep("offload", "offload", partial(_check_offload, options, model), 30),
    ]
    if options.cpu:  # it has no self-test, and llama.cpp makes no two devices of it
        return checks
    splits = [
        CheckStep(f"two devices, by {name}", "devices", partial(_compare, options, _SHARED, table, split), 15)
        for name, table, split in (("layer", _EXACT, _BY_LAYER), ("tensor", _FLASH, _BY_TENSOR))
    ]
    budget = CheckStep("two devices, memory", "devices", partial(_check_budget, options, model), 20)
    return [CheckStep("self-test", "self-test", lambda _: _prove(options.backend)), *checks, *splits, budget]


def _prove(backend: str) -> Mapping[str, Any]:
    tested = self_test(backend)
    facts = {"proofs": list(tested.proofs)}
    if tested.failure:
        raise CheckError(tested.failure, facts)
    return facts


def _test(options: Options, deadline: float) -> Mapping[str, Any]:
    command = [options.python, "-m", "pytest", "-p", "no:cacheprovider", "-k", "cuda", "--rootdir", ROOT]
    command += ["--numprocesses", str(min(_TEST_PROCESSES, os.cpu_count() or 1)), _CONTRACT]
    said = run(command, options.logs / "contract.log", deadline, {_BACKEND_VARIABLE: options.backend})
    return {"backend": options.backend, "tests": counted(said)}


def counted(said: str) -> dict[str, int]:
    """The counts in pytest's last line. Raises CheckError if no test has passed."""
    last = said.strip().splitlines()[-1] if said.strip() else ""
    counts = {ending: int(count) for count, ending in re.findall(r"(\d+) (passed|failed|skipped|deselected)", last)}
    if not counts.get("passed"):
        raise CheckError(f"pytest ran no test: {last}")
    return counts


def _compare(options: Options, shape: Shape, table: _Table, split: _Table | None, deadline: float) -> Mapping[str, Any]:
    """Compares with the CPU; with ``split``, a GPU that is shown as two devices."""
    path = options.work / "models" / f"twin-{shape.architecture}-{shape.head_dim}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(path, shape)
    command, prefix = tuple(runner_commands()["cuda"]), () if split is None else TWO_DEVICES
    own: dict[str, JsonValue] = {"path": str(path), "slots": 1, **table}
    on_cpu = Load(model_id="test/twin", backend="LlamaCppCpu", table={**own, "threads": 1})
    checked = Load(model_id="test/twin", backend=options.backend, table={**own, "threads": 2, **(split or {})})
    engines = ComparedEngine("CPU", command, on_cpu), ComparedEngine("checked", (*prefix, *command), checked)

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


def _check_offload(options: Options, model: CheckedModel, _deadline: float) -> Mapping[str, Any]:
    path = str(file_of(options, model))
    layers = {"all": -1, "half": model.shape.layer_count // 2, "none": 0}
    found: dict[str, Any] = {}
    for name, count in layers.items():
        found[name] = _load(options.backend, {"path": path, "n_ctx": 512, "slots": 2, "n_gpu_layers": count})
    facts = {"model": model.name, **found}
    if problem := verdict(found, options):
        raise CheckError(problem, facts)
    return facts


def _check_budget(options: Options, model: CheckedModel, _deadline: float) -> Mapping[str, Any]:
    """Whether the memory that is reserved for a model on two devices suffices. Raises CheckError."""
    table = {"path": str(file_of(options, model)), "n_ctx": 512, "slots": 2, **_BY_LAYER}
    facts = _load(options.backend, table, TWO_DEVICES)
    estimated = sum(facts["estimated_bytes"].values())
    if len(facts["devices"]) != 2 or set(facts["estimated_bytes"]) != set(facts["devices"]):
        raise CheckError(f"the estimate is for {facts['estimated_bytes']}, the runner uses {facts['devices']}", facts)
    if not options.small and facts["taken_bytes"] > _ESTIMATE_SLACK * estimated:
        raise CheckError(f"{estimated} bytes are reserved, and {facts['taken_bytes']} were taken", facts)
    return facts


def _load(backend: str, table: dict[str, Any], prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """The GPU memory in bytes that a load should take and takes, and the devices that the runner names."""
    load = Load(model_id="test/offload", backend=backend, table=table)
    before = _free()
    with Program([*prefix, *runner_command(_MODULE)]) as program:
        program.send(Estimate(load=load))
        program.until(lambda: program.estimated is not None)
        assert program.estimated is not None
        capabilities = program.load(load)
        (result,) = program.generate(ask("offload"))
        taken = before - _free()
        said = {
            "devices": list(capabilities.devices),
            "model_bytes": capabilities.model_bytes,
            "estimated_bytes": dict(program.estimated.choices[0].devices),
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
