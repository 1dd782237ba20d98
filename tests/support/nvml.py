"""A stand-in for the driver: the part of NVML's Python interface that exo uses, with invented devices."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class FakeDevice:
    """Memory in bytes; ``processes`` maps a process id to the memory that it has."""

    bus: int
    used: int = 0
    processes: Mapping[int, int] = field(default_factory=dict[int, int])


def fake_nvml(*devices: FakeDevice) -> ModuleType:
    """Replaces the module ``pynvml``. Each device has 80 GiB."""
    module = ModuleType("pynvml")
    module.__dict__.update(
        NVMLError=OSError,
        NVMLError_NotSupported=PermissionError,
        NVMLLibraryMismatchError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(devices),
        nvmlDeviceGetHandleByIndex=devices.__getitem__,
        nvmlDeviceGetName=_name,
        nvmlDeviceGetCudaComputeCapability=_capability,
        nvmlDeviceGetMemoryInfo=_memory,
        nvmlDeviceGetPciInfo=_pci,
        nvmlDeviceGetComputeRunningProcesses=_processes,
    )
    return module


def _name(_: FakeDevice) -> str:
    return "Invented"


def _capability(_: FakeDevice) -> tuple[int, int]:
    return 9, 0


def _memory(device: FakeDevice) -> SimpleNamespace:
    return SimpleNamespace(total=80 * GIB, free=80 * GIB - device.used)


def _pci(device: FakeDevice) -> SimpleNamespace:
    return SimpleNamespace(domain=0, bus=device.bus, device=0)


def _processes(device: FakeDevice) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in device.processes.items()]
