"""Finds the devices that this MLX build can use on this host, by computing something on each."""

from typing import Literal

import mlx.core as mx

from exo.worker.protocol.probe import Device
from exo.worker.runner_common.load_error import LoadError

Backend = Literal["MlxMetal", "MlxCuda", "MlxCpu"]


def backends() -> tuple[Backend, ...]:
    """Returns the backends that can compute here, GPU first."""
    found: list[Backend] = []
    if mx.metal.is_available() and _computes(mx.gpu):
        found.append("MlxMetal")
    if mx.cuda.is_available() and _computes(mx.gpu):
        found.append("MlxCuda")
    if mx.is_available(mx.cpu) and _computes(mx.cpu):
        found.append("MlxCpu")
    return tuple(found)


def use_backend(name: str) -> Backend:
    """Makes a backend the one that this thread computes with. Raises LoadError if it cannot compute here."""
    found = backends()
    if name not in found:
        usable = ", ".join(found) or "none"
        raise LoadError("model_load_failed", f"the backend {name!r} was requested, but MLX can use only: {usable}")
    backend = found[found.index(name)]
    mx.set_default_device(_kind(backend))
    return backend


def device(backend: Backend, index: int = 0) -> Device:
    """Describes a device. MLX reports no memory for a CPU."""
    info = mx.device_info(mx.Device(_kind(backend), index))
    total = next((info[key] for key in ("memory_size", "total_memory") if key in info), 0)
    return Device(name=str(info.get("device_name", backend)), backend=backend, memory_total=int(total))


def _computes(kind: mx.DeviceType) -> bool:
    try:
        return mx.sum(mx.ones(4, stream=kind), stream=kind).item() == 4
    except RuntimeError:
        return False


def _kind(backend: Backend) -> mx.DeviceType:
    return mx.cpu if backend == "MlxCpu" else mx.gpu
