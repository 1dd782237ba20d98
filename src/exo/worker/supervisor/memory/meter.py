"""Measures memory for the budget: what other programs leave free, and what loaded runners take."""

import logging
from collections.abc import Callable, Sequence
from typing import final

import anyio
from anyio.to_thread import run_sync

from exo.worker.supervisor.memory.budget import MemoryBudget
from exo.worker.supervisor.memory.host import memory_of, usable_memory, usable_ram
from exo.worker.supervisor.memory.memory import Memory

log = logging.getLogger(__name__)

_MEASURE_SECONDS = 5.0
"""Time between two measurements of the runners' memory."""


@final
class MemoryMeter:
    """Writes measurements into ``budget``. ``pid_of`` returns the process of a reservation, if it has one now."""

    def __init__(self, budget: MemoryBudget, pid_of: Callable[[str], int | None]) -> None:
        self._budget = budget
        self._pid_of = pid_of
        self._device_names: tuple[str, ...] = ()
        self._loaded = anyio.Event()
        self._most_ram: int | None = None  # None where the limit is the user's, whatever other programs take

    def set_capacity(self, capacity: Memory, device_names: Sequence[str], *, ram_is_fixed: bool) -> None:
        """See ``RunnerPool.set_capacity``."""
        self._most_ram = None if ram_is_fixed else capacity.host
        known = (self._budget.capacity or Memory()).devices
        self._budget.capacity = Memory(capacity.host, {**capacity.devices, **known})
        self._device_names = tuple(device_names)

    def runner_loaded(self) -> None:
        """Has the runners measured now, because another one has loaded."""
        self._loaded.set()

    async def run(self, on_measured: Callable[[], None]) -> None:
        """Measures regularly: the runners, and what is free while one waits for memory. Does not return."""
        while True:
            with anyio.move_on_after(_MEASURE_SECONDS):
                await self._loaded.wait()
            self._loaded = anyio.Event()
            if self._budget.has_waiters:
                await self.measure_free()
                on_measured()
            await self.measure_loaded()
            on_measured()

    async def measure_free(self) -> None:
        """Updates the capacity: other programs take and free memory."""
        if self._budget.capacity is None:
            return
        holders = {
            pid: tuple(each.reserved.devices) for each in self._budget if (pid := self._pid_of(each.name)) is not None
        }
        found: dict[str, int] = {}
        try:
            ram = await run_sync(usable_ram, tuple(holders), abandon_on_cancel=True)
            if any(self._device_names):
                found = await run_sync(usable_memory, self._device_names, holders, abandon_on_cancel=True)
        except Exception:
            log.exception("the free memory could not be measured")
            return
        capacity = self._budget.capacity  # another host may have come or gone meanwhile
        devices = {name: found.get(name, size) for name, size in capacity.devices.items()}
        self._budget.capacity = Memory(capacity.host if self._most_ram is None else min(self._most_ram, ram), devices)

    async def measure_loaded(self) -> None:
        """Updates the reservations of loaded runners."""
        loaded = [each for each in self._budget if each.state == "loaded"]
        by_pid = {pid: each for each in loaded if (pid := self._pid_of(each.name)) is not None}
        if not by_pid:
            return
        try:
            found = await run_sync(memory_of, list(by_pid), self._device_names, abandon_on_cancel=True)
        except Exception:
            log.exception("the memory of the runners could not be measured")
            return
        for pid, amount in found.items():
            # The runner may have ended during the measurement, and another one may have its name now.
            if self._budget.reservation(by_pid[pid].name) is by_pid[pid]:
                self._budget.measure(by_pid[pid].name, amount.host, amount.devices)
