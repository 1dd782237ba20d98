"""Whether layers that are to be on the card are there: by what the runner says, and by the card's free memory."""

import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from bench.gpu_check.models import Model, file_of, models
from bench.gpu_check.options import Options
from bench.gpu_check.record import CheckError, Step
from exo.worker.protocol.messages import Load, Probe
from exo.worker.protocol.runners import RUNNERS
from tests.support.program import Program, ask, runner_command

_MODULE = RUNNERS["cuda"].module
_ALL_LAYERS_SHARE = 0.85
"""Of the weights, that all layers must take on the card: llama.cpp keeps the embedding of the input in host memory."""
_NO_LAYER_SHARE = 0.15
"""At most, with no layer there: a process that only looks at the card takes some of it."""


def steps(options: Options) -> list[Step]:
    """One, with the first model."""
    return [Step("offload", "offload", partial(_check, options, models(options)[0]), 30)]


def _check(options: Options, model: Model, _deadline: float) -> Mapping[str, Any]:
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
    """What a load takes of the card, in bytes, and the devices that the runner names."""
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
    """Bytes free on all CUDA devices, by llama.cpp's own account."""
    done = subprocess.run([sys.executable, "-m", _MODULE, "--probe"], capture_output=True, check=True)
    devices = Probe.model_validate_json(done.stdout).devices
    return sum(device.memory_free for device in devices if device.backend == "LlamaCppCuda")


def verdict(found: Mapping[str, Mapping[str, Any]], options: Options) -> str:
    """What is wrong, or nothing."""
    everything, half, nothing = found["all"], found["half"], found["none"]
    if any(each["tokens"] != 16 for each in found.values()):
        return "a load did not generate the 16 tokens that it was asked for"
    if nothing["devices"] != ["CPU"]:
        return f"with n_gpu_layers = 0 the runner names {nothing['devices']}"
    if options.cpu:
        return "" if everything["devices"] == ["CPU"] else f"on the CPU the runner names {everything['devices']}"
    if not any(device.startswith("CUDA") for device in everything["devices"]):
        return f"with all layers on the card the runner names {everything['devices']}"
    if options.small:
        return ""  # a small model's weights are lost in what the driver takes
    size = everything["model_bytes"]
    if everything["taken_bytes"] < _ALL_LAYERS_SHARE * size:
        return f"all layers took {everything['taken_bytes']} bytes of the card, and the model has {size}"
    if nothing["taken_bytes"] > _NO_LAYER_SHARE * size:
        return f"no layer was to be on the card, and {nothing['taken_bytes']} bytes of it were taken"
    if not 0.3 < half["taken_bytes"] / everything["taken_bytes"] < 0.75:
        return f"half of the layers took {half['taken_bytes']} bytes, all of them {everything['taken_bytes']}"
    return ""
