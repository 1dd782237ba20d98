"""Probes this machine: asks the system, the NVIDIA driver, and each runner's ``--probe``."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import psutil
from anyio.abc import ByteReceiveStream
from anyio.to_thread import run_sync
from pydantic import ValidationError

from exo.start_process import start_process
from exo.worker.host import GpuProcess, Host, NvidiaDevice, with_engine_names
from exo.worker.protocol import nvidia_driver
from exo.worker.protocol.probe import Probe
from exo.worker.protocol.runners import RUNNERS
from exo.worker.supervisor.nvml import nvml_errors, query_nvml

PROBE_SECONDS = 15.0
TRY_SECONDS = 120.0
"""Deadline of probes that import a slow engine."""


def probe_commands(*, thorough: bool = False) -> dict[str, tuple[str, ...]]:
    """Each runner's probe command, by runner name.

    A runner in an environment of its own checks which packages are installed; if ``thorough``, also that they load.
    """
    return {
        name: (*spec.command, "--probe", *(("--try",) if thorough and spec.environment else ()))
        for name, spec in RUNNERS.items()
    }


async def probe_host(commands: Mapping[str, Sequence[str]] | None = None, deadline: float = PROBE_SECONDS) -> Host:
    """Probes all runners at once, then the driver. The engines are imported in the probes' processes, never here.

    A probe without a usable answer within ``deadline`` seconds is killed. Its runner counts as not installed, with a
    note that gives the reason. ``commands`` defaults to ``probe_commands()``.
    """
    probes: dict[str, Probe] = {}
    unanswered: set[str] = set()

    async def probe_runner(name: str, command: Sequence[str]) -> None:
        try:
            probes[name] = await _probe(name, command, deadline)
        except TimeoutError:
            unanswered.add(name)
            probes[name] = _unusable(name, f"did not answer within {deadline:g} s")

    commands = probe_commands() if commands is None else commands
    async with anyio.create_task_group() as tasks:
        for name, command in commands.items():
            tasks.start_soon(probe_runner, name, command)
    devices: Sequence[NvidiaDevice] = ()
    driver = problem = ""
    with anyio.move_on_after(deadline):  # only now: the probes themselves take memory on the devices
        devices, driver = await run_sync(query_nvml, _nvidia_driver, (devices, driver), abandon_on_cancel=True)
        if not devices:
            problem = await run_sync(_driver_problem, abandon_on_cancel=True)
    memory = psutil.virtual_memory()
    return Host(
        system=platform.system(),
        machine=platform.machine(),
        cpu_count=os.cpu_count() or 1,
        memory_total=memory.total,
        memory_available=memory.available,
        nvidia_devices=with_engine_names(devices, probes.values()),
        probes={name: probes[name] for name in commands},
        processor=_processor(),
        unanswered=frozenset(unanswered),
        driver=driver,
        driver_problem=problem,
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
    output, errors = bytearray(), bytearray()
    try:
        with anyio.fail_after(deadline):
            process = await start_process(command, stdin=subprocess.DEVNULL)
            async with process, anyio.create_task_group() as tasks:
                tasks.start_soon(_read, process.stdout, output)
                tasks.start_soon(_read, process.stderr, errors)
    except TimeoutError:  # a subclass of OSError
        raise
    except OSError as error:
        return _unusable(name, f"did not start: {error}")
    try:
        return Probe.model_validate_json(bytes(output))
    except ValidationError:
        last_line = (errors.decode(errors="replace").strip() or "nothing on standard error").splitlines()[-1]
        status = process.returncode
        ended = f"ended with status {status} and without an answer" if status else "gave no answer"
        return _unusable(name, f"{ended}: {last_line[:500]}")


async def _read(stream: ByteReceiveStream | None, data: bytearray) -> None:
    assert stream is not None
    async for part in stream:
        data += part


def _nvidia_driver(nvml: ModuleType) -> tuple[Sequence[NvidiaDevice], str]:
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    version, cuda = _told(nvml, "nvmlSystemGetDriverVersion"), _told(nvml, "nvmlSystemGetCudaDriverVersion_v2")
    supports = f", CUDA {cuda // 1000}.{cuda % 1000 // 10}" if cuda else ""
    return [_nvidia_device(nvml, each) for each in handles], f"{version or 'unknown version'}{supports}"


def _driver_problem() -> str:
    try:
        nvidia_driver.driver()
    except nvidia_driver.DriverError as error:
        return str(error)
    return ""


def _told(nvml: ModuleType, name: str, *arguments: object) -> Any:  # noqa: ANN401 -- each function has its own type
    """Calls an NVML function. Returns None if this driver or this device does not have it."""
    try:
        return getattr(nvml, name)(*arguments)
    except (*nvml_errors(nvml), AttributeError):
        return None


def _nvidia_device(nvml: ModuleType, handle: object) -> NvidiaDevice:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    except nvml.NVMLError_NotSupported:  # a device that shares the RAM
        total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    pci = nvml.nvmlDeviceGetPciInfo(handle)
    address = f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"
    lanes = [_told(nvml, f"nvmlDeviceGet{each}PcieLinkWidth", handle) for each in ("Curr", "Max")]
    persistence = _told(nvml, "nvmlDeviceGetPersistenceMode", handle)
    running = _told(nvml, "nvmlDeviceGetComputeRunningProcesses", handle) or ()
    return NvidiaDevice(
        str(nvml.nvmlDeviceGetName(handle)),
        f"{major}.{minor}",
        total,
        free,
        address,
        pcie_lanes=None if None in lanes else (int(lanes[0]), int(lanes[1])),
        persistence=None if persistence is None else bool(persistence),
        processes=tuple(GpuProcess(int(each.pid), _process_name(each.pid), each.usedGpuMemory) for each in running),
    )


def _process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:  # in another container, or gone
        return "?"
