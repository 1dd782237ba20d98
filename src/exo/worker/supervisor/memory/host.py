"""The memory that models may take on this machine, and the memory that runner processes have taken."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import psutil

from exo.worker.host import Host
from exo.worker.supervisor.memory.memory import Memory
from exo.worker.supervisor.nvml import query_nvml

_MARGIN, _LARGEST_MARGIN = 0.1, 4 << 30
"""The part of the RAM left to everything else: a share, and a limit in bytes."""
_METAL, _LLAMA_GPUS = "MlxMetal", ("LlamaCppCuda", "LlamaCppVulkan")
_CONTROL_GROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""The files with a container's memory limit, in versions 2 and 1 of control groups."""


def capacity(host: Host, limit: int | None = None) -> Memory:
    """The memory that all runners together may take. ``limit`` is bytes of RAM; the default is all but a margin.

    For an NVIDIA device it is the memory that was free when the host was probed, by the driver or, if that does not
    list the device, by llama.cpp. Metal shares the RAM, and MLX states how much of it the GPU may use. The first device
    comes first.
    """
    total = min(host.memory_total, _container_limit() or host.memory_total)
    ram = total - _margin(total) if limit is None else limit
    nvidia = sorted((each for each in host.nvidia_devices if each.id), key=lambda each: (len(each.id), each.id))
    engines = [each for probe in host.probes.values() for each in probe.devices]
    devices = {each.id: each.memory_free for each in nvidia}
    for each in engines:
        if each.backend in _LLAMA_GPUS:
            devices.setdefault(each.name, each.memory_free)
    metal = {each.name: each.memory_total for each in engines if each.backend == _METAL}
    return Memory(ram, devices | metal)


def _margin(total: int) -> int:
    return min(int(total * _MARGIN), _LARGEST_MARGIN)


def _container_limit() -> int | None:
    for path in _CONTROL_GROUPS:
        with suppress(OSError, ValueError):
            return int(path.read_text())
    return None


class ProcessMemory(NamedTuple):
    """Bytes that a process and its children use. ``devices`` is None if the driver does not report it."""

    host: int
    devices: Mapping[str, int] | None


def memory_of(pids: Collection[int], device_names: Sequence[str] = ()) -> dict[int, ProcessMemory]:
    """Returns the memory that each running process uses now. Asks the driver, so it may block.

    ``device_names`` are in the driver's order; a device with an empty name is left out.
    """
    on_devices = query_nvml(partial(_by_process, names=device_names), {}) if pids else {}
    found: dict[int, ProcessMemory] = {}
    for pid in pids:
        if family := _family(pid):
            known = [on_devices[each.pid] for each in family if each.pid in on_devices]
            devices = {name: sum(each.get(name, 0) for each in known) for each in known for name in each}
            found[pid] = ProcessMemory(sum(map(_resident, family)), devices if known else None)
    return found


def usable_ram(pids: Collection[int]) -> int:
    """Returns the bytes of RAM that our processes use or could still take.

    Other programs keep what they have, and half of the margin for what they take later.
    """
    memory = psutil.virtual_memory()
    ours = sum(_resident(each) for pid in pids for each in _family(pid))
    return max(0, memory.available + ours - _margin(memory.total) // 2)


def usable_memory(device_names: Sequence[str], holders: Mapping[int, Collection[str]]) -> dict[str, int]:
    """Returns the bytes of each device that our processes use or could still take.

    ``holders`` are our processes, with the devices on which each has a reservation. A device is left out if the driver
    does not report the memory of one of them there, as in a container. Asks the driver, so it may block.
    """

    def query(nvml: ModuleType) -> tuple[dict[str, int], dict[int, dict[str, int]]]:
        handles = {name: nvml.nvmlDeviceGetHandleByIndex(index) for index, name in enumerate(device_names) if name}
        free = {name: int(nvml.nvmlDeviceGetMemoryInfo(handle).free) for name, handle in handles.items()}
        return free, _by_process(nvml, device_names)

    nothing: tuple[dict[str, int], dict[int, dict[str, int]]] = {}, {}
    free, used = query_nvml(query, nothing)
    found: dict[str, int] = {}
    families = {pid: [each.pid for each in _family(pid)] for pid in holders}
    for name, size in free.items():
        has = {pid: [used[each][name] for each in families[pid] if name in used.get(each, {})] for pid in holders}
        if all(has[pid] for pid, reserved in holders.items() if name in reserved):
            found[name] = size + sum(map(sum, has.values()))
    return found


def _family(pid: int) -> list[psutil.Process]:
    """Returns a process and its children; nothing if it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:  # a child that has just ended
        return 0


def _by_process(nvml: ModuleType, names: Sequence[str]) -> dict[int, dict[str, int]]:
    """Returns bytes by process and device; nothing in a container, where the driver does not know our process ids."""
    sizes: dict[int, dict[str, int]] = {}
    for index, name in enumerate(names):
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(index)) if name else ()
        for each in processes:
            if each.usedGpuMemory is not None:
                sizes.setdefault(int(each.pid), {})[name] = int(each.usedGpuMemory)
    return sizes
