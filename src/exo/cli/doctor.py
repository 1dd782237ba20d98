"""``exo doctor``: the machine, the engines that work on it, and the commands that repair the others."""

import json
from collections.abc import Iterator
from dataclasses import asdict

import anyio
import typer

from exo.cli.console import out, say
from exo.cli.options import AsJson
from exo.exit_code import ExitCode
from exo.worker.host import Host
from exo.worker.protocol.cores import cpu_pressure, cpu_quota, physical_cores, usable_cpus
from exo.worker.protocol.messages import Probe
from exo.worker.supervisor.host_probe import TRY_SECONDS, probe_commands, probe_host

_CROWDED = 0.1
"""The CPU counts as shared if processes wait for it in this share of the time."""


def doctor(as_json: AsJson = False) -> None:
    """Show what this machine has, which engines work on it, and the commands that repair the others."""
    host = anyio.run(probe_host, probe_commands(thorough=True), TRY_SECONDS)
    if as_json:
        out.print_json(json.dumps(_as_json(host)))
    else:
        for line in as_text(host):
            say(line)
    raise typer.Exit(ExitCode.OK if any(probe.backends for probe in host.probes.values()) else ExitCode.FAILED)


def _as_json(host: Host) -> dict[str, object]:
    """Memory is in bytes."""
    return {
        "system": host.system,
        "machine": host.machine,
        "cpu_count": host.cpu_count,
        "memory_total": host.memory_total,
        "memory_available": host.memory_available,
        "nvidia_devices": [asdict(device) for device in host.nvidia_devices],
        "runners": {name: probe.model_dump() for name, probe in host.probes.items()},
    }


def as_text(host: Host) -> Iterator[str]:
    """The findings line by line."""
    yield f"host      {host.system} {host.machine}, {host.cpu_count} logical CPUs"
    yield from _cpu()
    yield f"memory    {_gib(host.memory_available)} available of {_gib(host.memory_total)}"
    for device in host.nvidia_devices:
        used = f"{_gib(device.memory_total - device.memory_free)} in use of {_gib(device.memory_total)}"
        name = f"{device.id or 'hidden from engines'}: {device.name}"
        yield f"NVIDIA    {name}, compute capability {device.compute_capability}, at {device.address}, {used}"
    if not host.nvidia_devices:
        yield "NVIDIA    no device, or no driver that answers"
    for name, probe in host.probes.items():
        yield from _runner(name, probe)


def _cpu() -> Iterator[str]:
    """The threads that a runner may use, their limits, and whether processes wait for a CPU now."""
    cores, cpus, quota = physical_cores(), len(usable_cpus()), cpu_quota()
    limits = [f"{cpus} logical CPUs in the affinity mask", *([] if quota is None else [f"a quota of {quota:g} CPUs"])]
    yield f"CPU       a model computes with up to {cores} thread{'s'[: cores > 1]}: {', '.join(limits)}"
    pressure = cpu_pressure()
    if pressure is not None:
        busy = "CPU is shared, so models compute with fewer threads" if pressure >= _CROWDED else "quiet"
        yield f"          a process waited for a CPU in {pressure:.0%} of the last 10 s: {busy}"


def _runner(name: str, probe: Probe) -> Iterator[str]:
    yield ""
    state = f"{probe.engine} {probe.version}" if probe.installed else f"{probe.engine}: not usable"
    yield f"runner {name}: {state}"
    if probe.installed:
        yield f"  serves  {', '.join(probe.backends) or 'nothing here'}"
    for device in probe.devices:
        memory = f", {_gib(device.memory_free)} free of {_gib(device.memory_total)}" if device.memory_total else ""
        yield f"  device  {device.name} ({device.description}) for {device.backend}{memory}"
    for note in probe.notes:
        yield f"  note    {note}"
    if probe.remedy:
        yield f"  repair  {probe.remedy}"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
