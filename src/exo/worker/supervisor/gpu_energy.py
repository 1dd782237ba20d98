"""The energy that the GPUs of this machine take, by the counters of their driver."""

import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from threading import Event
from types import ModuleType
from typing import final

import anyio
from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from exo.worker.supervisor.nvml import query_nvml

_SECONDS = 0.05
"""Time between two readings. Drivers count about as often."""


@final
class GpuEnergy:
    """The counters of all GPUs together, which are read while ``followed`` lasts."""

    def __init__(self) -> None:
        self.readings: list[tuple[int, float]] = []
        """Times by ``time.monotonic_ns``, and joules."""
        self._over = Event()

    @asynccontextmanager
    async def followed(self) -> AsyncGenerator[None]:
        """Reads the counters in a thread. Without a driver, or if a GPU has no counter, there are no readings."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._in_thread)
            try:
                yield
            finally:
                self._over.set()

    def joules(self, begin: int, end: int) -> float | None:
        """The energy between two times by ``time.monotonic_ns``; None without two readings."""
        if len(self.readings) < 2:
            return None
        return energy_at(self.readings, end) - energy_at(self.readings, begin)

    async def _in_thread(self) -> None:
        """The thread is not one of those that all requests share, because it is busy as long as its request lasts."""
        await run_sync(query_nvml, self._follow, None, limiter=CapacityLimiter(1))

    def _follow(self, nvml: ModuleType) -> None:
        gpus = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        while gpus and not self._over.is_set():
            millijoules = sum(nvml.nvmlDeviceGetTotalEnergyConsumption(each) for each in gpus)
            self.readings.append((time.monotonic_ns(), millijoules / 1000))
            self._over.wait(_SECONDS)


def energy_at(readings: Sequence[tuple[int, float]], when: int) -> float:
    """The counter at a time, between at least two readings or beyond them, where it goes on at the same rate."""
    after = min(max(bisect_left(readings, (when, 0.0)), 1), len(readings) - 1)
    (earlier, low), (later, high) = readings[after - 1 : after + 1]
    return low + (high - low) * (when - earlier) / (later - earlier)
