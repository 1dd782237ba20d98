"""Memory of the runner at work. One runner is up at a time, so it is whatever this process has below it."""

from contextlib import suppress
from importlib import import_module
from types import ModuleType

import anyio
import psutil

from exo.compare.comparison import MemoryUse

_PERIOD_SECONDS = 0.1


class MemoryWatch:
    """Made when the runner is ready; ``watch`` then samples until it is cancelled. Sizes are bytes."""

    def __init__(self) -> None:
        self._ready = self._peak = _resident()
        self._device_peak = _on_devices()

    async def watch(self) -> None:
        """Keeps the largest of everything sampled."""
        while True:
            await anyio.sleep(_PERIOD_SECONDS)
            self._peak = max(self._peak, _resident())

    def use(self) -> MemoryUse:
        """What was seen so far; the devices are asked once more, as an engine keeps there what it has taken."""
        sizes = [size for size in (self._device_peak, _on_devices()) if size is not None]
        return MemoryUse(
            resident_ready=self._ready, resident_peak=self._peak, device_peak=max(sizes) if sizes else None
        )


def _resident() -> int:
    size = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            size += process.memory_info().rss
    return size


def _on_devices() -> int | None:
    """Through NVML. None without a driver, or where it does not know our processes, as often in a container."""
    nvml = import_module("pynvml")  # it ships no types, so a plain import would not check
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    try:
        nvml.nvmlInit()
        try:
            sizes = [size for pid, size in _device_processes(nvml) if pid in ours and size is not None]
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return None
    return sum(sizes) if sizes else None


def _device_processes(nvml: ModuleType) -> list[tuple[int, int | None]]:
    """Process id and bytes, once for each device that the process uses."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    found = [each for handle in handles for each in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    return [(int(each.pid), each.usedGpuMemory) for each in found]
