"""``exo doctor``: the machine, its engines and models, and the commands that repair what does not work."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import anyio
import typer

from exo.cards.catalogue import Found
from exo.cli.console import out, say, warn
from exo.cli.doctor.model_findings import as_text as model_text
from exo.cli.doctor.model_findings import findings
from exo.cli.models.local_models import catalogue_of, size_of_prefixes, store_of
from exo.cli.options import AsJson
from exo.config import Settings
from exo.exit_code import ExitCode
from exo.setup.cuda import Plugin, installed_plugin, set_up_cuda
from exo.setup.gpu_plugin import CUDA, GPU_BACKENDS, VULKAN, SelfTest, self_test
from exo.setup.vulkan import VulkanPlugin, installed_vulkan
from exo.terminal import printable
from exo.worker.host import Host, NvidiaDevice, differing_engines, unused_gpus
from exo.worker.protocol.cores import cpu_pressure, cpu_quota, physical_cores, usable_cpus
from exo.worker.protocol.probe import Probe
from exo.worker.router import NO_REMOTE_HOSTS, RemoteHosts
from exo.worker.supervisor.ask_hosts import ask_hosts
from exo.worker.supervisor.host_probe import TRY_SECONDS, probe_commands, probe_host

_CROWDED = 0.1
"""The CPU counts as shared if processes wait for it in this share of the time."""


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Set up the CUDA plug-in first if a GPU is not used.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what this machine has, which engines work on it, and what is wrong with its models."""
    host = anyio.run(probe_host, probe_commands(thorough=True), TRY_SECONDS)
    if fix and unused_gpus(host):
        warn(set_up_cuda())
        host = anyio.run(probe_host, probe_commands(thorough=True), TRY_SECONDS)
    plugin, vulkan = installed_plugin(), installed_vulkan()
    tested = {each: self_test(each) for each in host.probes["cuda"].backends if each in GPU_BACKENDS}
    settings = Settings.load()
    catalogue = catalogue_of(settings)
    models = anyio.run(findings, catalogue, store_of(settings), host, settings)
    remote = anyio.run(ask_hosts, settings.hosts) if settings.hosts else NO_REMOTE_HOSTS
    if as_json:
        by_backend = {each: asdict(result) for each, result in tested.items()}
        cuda = {"plugin": plugin and asdict(plugin), "self_test": by_backend.get(CUDA)}
        others = {"plugin": vulkan and asdict(vulkan), "self_test": by_backend.get(VULKAN)}
        prefixes = size_of_prefixes(settings.prefix_directory)
        more: dict[str, object] = {
            "cuda": cuda,
            "vulkan": others,
            "models": [each.model_dump() for each in models],
            "prefix_bytes": prefixes,
        }
        if settings.hosts:
            more["hosts"] = {**{name: _as_json(each) for name, each in remote.hosts.items()}, **remote.down}
        out.print_json(json.dumps({**_as_json(host), **more, "unusable": catalogue.last_found.unusable}))
    else:
        texts = (
            *as_text(host),
            *plugin_text(plugin, tested.get(CUDA)),
            *vulkan_text(vulkan, tested.get(VULKAN)),
            *model_text(models),
            *others_text(catalogue.last_found),
            *prefix_text(settings),
            *hosts_text(host, remote),
        )
        for line in texts:
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
        "driver": host.driver,
        "nvidia_devices": [asdict(device) for device in host.nvidia_devices],
        "runners": {name: probe.model_dump() for name, probe in host.probes.items()},
    }


def as_text(host: Host, *, is_here: bool = True) -> Iterator[str]:
    """The facts of a host. The limits of its CPU are known only for this one."""
    yield f"host      {host.system} {host.machine}, {host.cpu_count} logical CPUs"
    yield from _cpu() if is_here else ()
    yield f"memory    {_gib(host.memory_available)} available of {_gib(host.memory_total)}"
    if host.driver:
        yield f"driver    NVIDIA {host.driver}"
    for device in host.nvidia_devices:
        used = f"{_gib(device.memory_total - device.memory_free)} in use of {_gib(device.memory_total)}"
        name = f"{device.id or 'hidden from engines'}: {device.name}"
        yield f"NVIDIA    {name}, compute capability {device.compute_capability}, at {device.address}, {used}"
        yield from _device(device)
    if not host.nvidia_devices:
        yield f"NVIDIA    {host.driver_problem or 'no device, or no driver'}"
    for name, probe in host.probes.items():
        yield from _runner(name, probe)


def hosts_text(here: Host, remote: RemoteHosts) -> Iterator[str]:
    """The other hosts: what each has, or why it cannot be used."""
    for name, host in remote.hosts.items():
        yield ""
        yield f"-- host {name}"
        yield from as_text(host, is_here=False)
    for name, why in remote.down.items():
        yield ""
        yield f"-- host {name} {why}"
    for each in differing_engines(here, remote.hosts):
        yield f"  note    {each}; their texts may differ by rounding"


def _device(device: NvidiaDevice) -> Iterator[str]:
    """The link to the device, and what else runs on it."""
    link: list[str] = []
    if device.pcie_lanes is not None:
        used, most = device.pcie_lanes
        link.append(f"{used} PCIe lanes" if used == most else f"{used} of {most} PCIe lanes, so it loads models slower")
    if device.persistence is not None:
        off = "off, so the first use takes seconds longer (nvidia-smi -pm 1)"
        link.append(f"persistence mode {'on' if device.persistence else off}")
    if link:
        yield f"          {'; '.join(link)}"
    for each in device.processes:
        memory = "" if each.memory is None else f" has {_gib(each.memory)}"
        yield f"          process {each.pid} ({printable(each.name)}){memory}"


def plugin_text(plugin: Plugin | None, tested: SelfTest | None) -> Iterator[str]:
    """llama.cpp's CUDA plug-in, and what it has shown on each GPU."""
    if plugin is not None:
        yield ""
        has = f"machine code for {' '.join(plugin.machine_code) or 'no GPU'}"
        ptx = f"; PTX, compiled by the driver at first use, from {' '.join(plugin.ptx)} on" if plugin.ptx else ""
        yield "CUDA plug-in: {}, CUDA {}.{}".format(plugin.source, *plugin.cuda)
        yield f"  code    {has}{ptx}"
    yield from _proofs(tested)


def vulkan_text(plugin: VulkanPlugin | None, tested: SelfTest | None) -> Iterator[str]:
    """llama.cpp's Vulkan plug-in, and what it has shown on each GPU."""
    if plugin is not None:
        yield ""
        yield f"Vulkan plug-in: {plugin.source}"
        if tested is None:
            yield "  note    it is used if CUDA gives no device"
    yield from _proofs(tested)


def _proofs(tested: SelfTest | None) -> Iterator[str]:
    if tested is None:
        return
    for each in tested.proofs:
        if not each["failure"]:
            least = f"log-probabilities within {each['difference']:.2g} nats of the CPU's (bound {each['bound']})"
            yield f"  proved  {each['device']}: all layers of a tiny model on it, {least}, in {each['seconds']:.1f} s"
    if tested.failure:
        yield f"  failed  {tested.failure}"


def others_text(found: Found) -> Iterator[str]:
    """The number of models that other programs keep, and of their files that cannot be used."""
    if found.models or found.unusable:
        yield ""
        yield f"{len(found.models)} models are in other programs' folders"
    if found.unusable:
        yield f"  note    {len(found.unusable)} files or folders there cannot be used; `exo list -v` names them"


def prefix_text(settings: Settings) -> Iterator[str]:
    """The size of the computed prompts on disk, if they take 1 GiB or more."""
    if (size := size_of_prefixes(settings.prefix_directory)) >= 1 << 30:
        yield ""
        yield f"computed prompts take {_gib(size)} in {settings.prefix_directory}"
        yield "  repair  `exo rm MODEL` deletes those of a model; prefix_disk_bytes in a model card limits them"


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
