"""A machine that runs models: its processors, memory, NVIDIA devices, and the runners' probes. Pure data.

``supervisor/host_probe.py`` finds all of it out.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from exo.worker.protocol.probe import Probe


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that has memory on a device; None if the driver does not tell how much."""

    pid: int
    name: str
    memory: int | None


@dataclass(frozen=True, slots=True)
class NvidiaDevice:
    """One device as the driver sees it, whether or not an engine can use it. Memory in bytes."""

    name: str
    compute_capability: str  # such as "9.0"
    memory_total: int
    memory_free: int
    address: str = ""  # on the PCI bus, such as "0000:c1:00.0"
    id: str = ""
    """The engines' name for it, such as "CUDA0"; empty if it is hidden from them, as by CUDA_VISIBLE_DEVICES."""
    pcie_lanes: tuple[int, int] | None = None
    """Lanes in use, and the most that device and slot have; None if the driver does not tell."""
    persistence: bool | None = None
    """Whether the driver stays loaded while no process uses the device."""
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True, slots=True)
class Host:
    """One machine at one moment. Memory in bytes."""

    system: str
    machine: str
    cpu_count: int
    memory_total: int
    memory_available: int
    nvidia_devices: tuple[NvidiaDevice, ...]
    """In the driver's order. Empty without an NVIDIA driver that answers."""
    probes: Mapping[str, Probe]
    """One for each runner, by its name."""
    processor: str = ""
    """The processor's model name, where it has one."""
    unanswered: frozenset[str] = frozenset()
    """Runners whose probe timed out. They may work: nothing is known about them."""
    driver: str = ""
    """Version of the NVIDIA driver and the CUDA that it supports, such as "580.95.05, CUDA 13.0"."""
    driver_problem: str = ""
    """Why an installed driver does not answer."""


def unused_gpus(host: Host) -> str:
    """A sentence with reason and remedy if llama.cpp uses none of the NVIDIA GPUs that are here; empty otherwise."""
    if host.driver_problem:
        return f"{host.driver_problem}; models run on the CPU"
    probe = host.probes.get("cuda")
    if not host.nvidia_devices or probe is None or not probe.installed:
        return ""
    if {"LlamaCppCuda", "LlamaCppVulkan"} & {*probe.backends}:
        return ""
    names = ", ".join(dict.fromkeys(each.name for each in host.nvidia_devices))
    remedy = f"; to fix it: {probe.remedy}" if probe.remedy else ""
    return f"llama.cpp does not use {names}: {'; '.join(probe.notes) or 'it gives no reason'}{remedy}"


def differing_engines(here: Host, others: Mapping[str, Host]) -> Iterator[str]:
    """A sentence for each engine that another host has in another version. Its texts may differ by rounding."""
    for name, host in others.items():
        for runner, there in host.probes.items():
            ours = here.probes.get(runner)
            if ours is not None and ours.installed and there.installed and ours.version != there.version:
                yield f"host {name} has {there.engine} {there.version}, and this machine {ours.version}"


def updated(before: Host, now: Host) -> Host:
    """``now``, with the earlier answers of the runners whose probe timed out this time."""
    silent = now.unanswered - before.unanswered
    probes = {name: before.probes[name] if name in silent else probe for name, probe in now.probes.items()}
    devices = with_engine_names(now.nvidia_devices, probes.values())
    return replace(now, probes=probes, nvidia_devices=devices, unanswered=now.unanswered & before.unanswered)


def with_engine_names(devices: Iterable[NvidiaDevice], probes: Iterable[Probe]) -> tuple[NvidiaDevice, ...]:
    """The driver's devices with the engines' names, matched by PCI address: CUDA's order is not the driver's.

    If no engine states an address, the driver's order has to do.
    """
    names = {each.address: each.name for probe in probes for each in probe.devices if each.address}
    return tuple(
        replace(each, id=names.get(each.address, "") if names else f"CUDA{index}") for index, each in enumerate(devices)
    )
