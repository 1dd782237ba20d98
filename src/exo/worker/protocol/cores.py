"""The CPU cores that this process may use, and how one server's runners share them."""

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

CPU_BACKENDS = frozenset({"LlamaCppCpu", "MlxCpu"})
"""Backends whose runners compute on the CPU alone."""
_GROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> frozenset[int]:
    """The numbers of the logical CPUs in this process's affinity mask."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """The number of cores in this process's affinity mask, but no more than its CPU quota, and at least 1.

    Two hyperthreads of one core count once, because the second one slows matrix products down.
    """
    cores: set[str] = set()
    for cpu in usable_cpus():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    return max(1, min(len(cores), int(cpu_quota() or len(cores))))


def cpu_quota(groups: Path = _GROUPS, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The CPU quota of this process's control group, in CPUs; None without a limit.

    Reads version 2's ``cpu.max`` from the process's own group up to the root, and version 1's quota at the root, where
    a container sees its own.
    """
    quotas: list[float] = []
    with suppress(OSError, ValueError):
        lines = membership.read_text().splitlines()
        own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
        folder = groups / own.lstrip("/")
        for each in (folder, *folder.parents):
            if not each.is_relative_to(groups):
                break
            with suppress(OSError, ValueError):
                quota, period = (each / "cpu.max").read_text().split()
                quotas.append(int(quota) / int(period))  # "max" is not a number: there is no limit
    with suppress(OSError, ValueError):
        quota = int((groups / "cpu" / "cpu.cfs_quota_us").read_text())
        period = int((groups / "cpu" / "cpu.cfs_period_us").read_text())
        if quota > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def shares(n_cores: int, runners: Collection[str]) -> dict[str, int]:
    """Divides the cores among the runners. Each gets at least one; the remainder goes to the first ones."""
    if not runners:
        return {}
    each, rest = divmod(n_cores, len(runners))
    return {name: max(1, each + (index < rest)) for index, name in enumerate(runners)}


def cpu_pressure() -> float | None:
    """Share of the last ten seconds, 0 to 1, in which a process waited for a CPU. None if Linux does not report it."""
    with suppress(OSError, ValueError, IndexError):
        some = Path("/proc/pressure/cpu").read_text().splitlines()[0]
        return float(some.partition("avg10=")[2].split()[0]) / 100
    return None
