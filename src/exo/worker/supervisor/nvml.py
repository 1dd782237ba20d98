"""Asks NVML, NVIDIA's library for its driver, for the memory, utilisation, temperature and power of the GPUs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TypeVar

_Answer = TypeVar("_Answer")


def query_nvml(query: Callable[[ModuleType], _Answer], default: _Answer) -> _Answer:
    """Calls ``query`` with NVML's Python module. Returns ``default`` without a driver, or if the query fails."""
    nvml = import_module("pynvml")  # it ships no types, so a plain import would not type-check
    try:
        nvml.nvmlInit()
        try:
            return query(nvml)
        finally:
            nvml.nvmlShutdown()
    except nvml_errors(nvml):
        return default


def nvml_errors(nvml: ModuleType) -> tuple[type[Exception], ...]:
    """A driver that lacks a function is an error of another class if NVML's own headers have a newer version of it."""
    return nvml.NVMLError, nvml.NVMLLibraryMismatchError


@dataclass(frozen=True, slots=True)
class GpuGauges:
    """One GPU now. None where the driver does not tell. Memory in bytes."""

    name: str
    """The engines' name of the device, such as "CUDA0", or its address if it is hidden from them."""
    memory_used: int
    memory_free: int
    utilisation: float | None
    """Share of the last moment in which it computed, 0 to 1."""
    celsius: float | None
    watts: float | None


def read_gpus(names: Sequence[str]) -> list[GpuGauges]:
    """Reads the GPUs with these names, which are in the driver's order. Empty without a driver. May block."""

    def query(nvml: ModuleType) -> list[GpuGauges]:
        return [_read(nvml, nvml.nvmlDeviceGetHandleByIndex(index), name) for index, name in enumerate(names)]

    return query_nvml(query, []) if names else []


def _read(nvml: ModuleType, device: object, name: str) -> GpuGauges:
    def told(read: Callable[[], float], scale: float) -> float | None:
        try:
            return read() / scale
        except nvml_errors(nvml):
            return None

    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    return GpuGauges(
        name=name,
        memory_used=int(memory.total - memory.free),
        memory_free=int(memory.free),
        utilisation=told(lambda: nvml.nvmlDeviceGetUtilizationRates(device).gpu, 100),
        celsius=told(lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU), 1),
        watts=told(lambda: nvml.nvmlDeviceGetPowerUsage(device), 1000),
    )
