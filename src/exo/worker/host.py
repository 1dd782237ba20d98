"""What this machine has, found out by asking: processors, memory, NVIDIA devices, and what each runner can do here."""

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import anyio
import psutil
from anyio.to_thread import run_sync
from pydantic import ValidationError

from exo.worker.protocol.messages import Probe
from exo.worker.protocol.runners import RUNNERS

PROBE_SECONDS = 15.0
TRY_SECONDS = 120.0
"""For probes that import an engine which takes long."""


@dataclass(frozen=True, slots=True)
class NvidiaDevice:
    """One device as the driver sees it, whether or not an engine can use it. Memory in bytes."""

    name: str
    compute_capability: str
    """Major and minor number, such as "9.0"."""
    memory_total: int
    memory_free: int
    address: str = ""
    """On the PCI bus, such as "0000:c1:00.0"."""
    id: str = ""
    """What engines call it, such as "CUDA0"; empty where it is hidden from them, as by CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True, slots=True)
class Host:
    """One machine at one moment. Memory in bytes."""

    system: str
    machine: str
    cpu_count: int
    memory_total: int
    memory_available: int
    nvidia_devices: tuple[NvidiaDevice, ...]
    """In the driver's order. Empty where there is no NVIDIA driver, or none that answers."""
    probes: Mapping[str, Probe]
    """By runner name, one for each runner."""
    processor: str = ""
    """What the processors call themselves; empty where they do not."""
    unanswered: frozenset[str] = frozenset()
    """Runners whose probe did not answer in time, which says nothing about what they can do."""


def probe_commands(*, thorough: bool = False) -> dict[str, tuple[str, ...]]:
    """The command by which each runner tells what it can do here, by runner name.

    A runner in an environment of its own looks what is installed there, and only if ``thorough`` whether that loads.
    """
    return {
        name: (*spec.command, "--probe", *(("--try",) if thorough and spec.environment else ()))
        for name, spec in RUNNERS.items()
    }


async def probe_host(commands: Mapping[str, Sequence[str]] | None = None, deadline: float = PROBE_SECONDS) -> Host:
    """Asks every runner, all at once, and the driver; the engines are imported by the runners' probes, never here.

    A probe that says nothing usable within ``deadline`` seconds is killed and counts as not installed, with a note that
    says why. ``commands`` defaults to ``probe_commands()``.
    """
    probes: dict[str, Probe] = {}
    unanswered: set[str] = set()

    async def ask_runner(name: str, command: Sequence[str]) -> None:
        try:
            probes[name] = await _probe(name, command, deadline)
        except TimeoutError:
            unanswered.add(name)
            probes[name] = _unusable(name, f"did not answer within {deadline:g} s")

    commands = probe_commands() if commands is None else commands
    async with anyio.create_task_group() as tasks:
        for name, command in commands.items():
            tasks.start_soon(ask_runner, name, command)
    devices: Sequence[NvidiaDevice] = ()
    with anyio.move_on_after(deadline):  # only now, since a probe itself takes memory on devices
        devices = await run_sync(_nvidia_devices, abandon_on_cancel=True)
    memory = psutil.virtual_memory()
    return Host(
        system=platform.system(),
        machine=platform.machine(),
        cpu_count=os.cpu_count() or 1,
        memory_total=memory.total,
        memory_available=memory.available,
        nvidia_devices=called(devices, probes.values()),
        probes={name: probes[name] for name in commands},
        processor=_processor(),
        unanswered=frozenset(unanswered),
    )


def updated(before: Host, now: Host) -> Host:
    """``now``, but of runners that did not answer this time what they answered before."""
    silent = now.unanswered - before.unanswered
    probes = {name: before.probes[name] if name in silent else probe for name, probe in now.probes.items()}
    devices = called(now.nvidia_devices, probes.values())
    return replace(now, probes=probes, nvidia_devices=devices, unanswered=now.unanswered & before.unanswered)


def called(devices: Iterable[NvidiaDevice], probes: Iterable[Probe]) -> tuple[NvidiaDevice, ...]:
    """The driver's devices by the names that engines have for them, whose order is CUDA's and not the driver's.

    Where no engine tells an address, there is nothing to go by but the driver's order.
    """
    names = {each.address: each.name for probe in probes for each in probe.devices if each.address}
    return tuple(
        replace(each, id=names.get(each.address, "") if names else f"CUDA{index}") for index, each in enumerate(devices)
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _unusable(name: str, why: str) -> Probe:
    remedy = RUNNERS[name].setup if name in RUNNERS else ""
    return Probe(installed=False, engine=name, notes=(f"the probe of runner {name} {why}",), remedy=remedy)


async def _probe(name: str, command: Sequence[str], deadline: float) -> Probe:
    """Raises ``TimeoutError``."""
    try:
        with anyio.fail_after(deadline):
            done = await anyio.run_process(command, stdin=subprocess.DEVNULL, check=False)
    except TimeoutError:  # which is an OSError
        raise
    except OSError as error:
        return _unusable(name, f"did not start: {error}")
    try:
        return Probe.model_validate_json(done.stdout)
    except ValidationError:
        said = (done.stderr.decode(errors="replace").strip() or "nothing on standard error").splitlines()[-1]
        ended = f"ended with status {done.returncode} and without an answer" if done.returncode else "gave no answer"
        return _unusable(name, f"{ended}: {said[:500]}")


def _nvidia_devices() -> tuple[NvidiaDevice, ...]:
    """Devices through NVML; none where the driver is absent or fails, which is a normal answer."""
    nvml = import_module("pynvml")  # it ships no types, so a plain import would not check
    try:
        nvml.nvmlInit()
        try:
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
            return tuple(_nvidia_device(nvml, handle) for handle in handles)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return ()


def _nvidia_device(nvml: ModuleType, handle: object) -> NvidiaDevice:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    except nvml.NVMLError_NotSupported:  # a device that shares the processors' memory
        total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    pci = nvml.nvmlDeviceGetPciInfo(handle)
    address = f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"
    return NvidiaDevice(str(nvml.nvmlDeviceGetName(handle)), f"{major}.{minor}", total, free, address)
