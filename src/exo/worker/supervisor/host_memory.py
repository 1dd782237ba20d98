"""How much memory models may take on this machine, and how much a runner has taken."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import psutil

from exo.worker.host import Host
from exo.worker.supervisor.memory import Memory

_MARGIN, _LARGEST_MARGIN = 0.1, 4 << 30
"""Of the processors' memory, what is left to everything else: a share, and bytes that it is at most."""
_METAL = "MlxMetal"
_CONTROL_GROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux tells a container's limit, by version 2 and 1 of control groups."""


def capacity(host: Host, limit: int | None = None) -> Memory:
    """What all runners together may take. ``limit`` are bytes of the processors' memory, by default all but a margin.

    Of each NVIDIA device it is what was free when the host was probed. Metal takes the processors' memory, of which MLX
    says how much a GPU may. The first device comes first.
    """
    total = min(host.memory_total, _container_limit() or host.memory_total)
    processors = total - min(int(total * _MARGIN), _LARGEST_MARGIN) if limit is None else limit
    nvidia = sorted((each for each in host.nvidia_devices if each.id), key=lambda each: (len(each.id), each.id))
    metal = [each for probe in host.probes.values() for each in probe.devices if each.backend == _METAL]
    devices = {each.id: each.memory_free for each in nvidia} | {each.name: each.memory_total for each in metal}
    return Memory(processors, devices)


def _container_limit() -> int | None:
    for path in _CONTROL_GROUPS:
        with suppress(OSError, ValueError):
            return int(path.read_text())
    return None


class Taken(NamedTuple):
    """Bytes that a process has, its children's included. ``devices`` None: nobody can tell."""

    host: int
    devices: Mapping[str, int] | None


def taken(pids: Collection[int], device_names: Sequence[str] = ()) -> dict[int, Taken]:
    """What each of these processes has now; those that are gone are left out. Asks the driver, so it may wait.

    ``device_names`` are in the driver's order; a device that has none is left out.
    """
    on_devices = _on_devices(device_names) if pids else {}
    found: dict[int, Taken] = {}
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
            known = [on_devices[each.pid] for each in family if each.pid in on_devices]
            devices = {name: sum(each.get(name, 0) for each in known) for each in known for name in each}
            found[pid] = Taken(sum(map(_resident, family)), devices if known else None)
    return found


def room(device_names: Sequence[str], holders: Mapping[int, Collection[str]]) -> dict[str, int]:
    """Bytes of each device that our processes have or could have now: what is free, and what they have.

    ``holders`` are our processes, with the devices on which memory is kept for them. A device is left out where the
    driver does not tell what one of them has there, as in a container. Asks the driver, so it may wait.
    """
    nvml = import_module("pynvml")  # it ships no types, so a plain import would not check
    try:
        nvml.nvmlInit()
        try:
            free = {
                name: int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).free)
                for index, name in enumerate(device_names)
                if name
            }
            used = _by_process(nvml, device_names)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return {}
    found: dict[str, int] = {}
    families = {pid: _family(pid) for pid in holders}
    for name, size in free.items():
        has = {pid: [used[each][name] for each in families[pid] if name in used.get(each, {})] for pid in holders}
        if all(has[pid] for pid, kept in holders.items() if name in kept):
            found[name] = size + sum(map(sum, has.values()))
    return found


def _family(pid: int) -> list[int]:
    """A process and its children, or none where it is gone."""
    try:
        return [pid, *(each.pid for each in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:  # a child that has just ended
        return 0


def _on_devices(names: Sequence[str]) -> dict[int, dict[str, int]]:
    """By process and device, through NVML. Empty without a driver, or where it does not know us, as in a container."""
    nvml = import_module("pynvml")  # it ships no types, so a plain import would not check
    try:
        nvml.nvmlInit()
        try:
            return _by_process(nvml, names)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return {}


def _by_process(nvml: ModuleType, names: Sequence[str]) -> dict[int, dict[str, int]]:
    sizes: dict[int, dict[str, int]] = {}
    for index, name in enumerate(names):
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(index)) if name else ()
        for each in processes:
            if each.usedGpuMemory is not None:
                sizes.setdefault(int(each.pid), {})[name] = int(each.usedGpuMemory)
    return sizes
