"""Measurements that come when the budget has changed meanwhile."""

from collections.abc import Collection

import pytest

from exo.worker.supervisor.memory import meter
from exo.worker.supervisor.memory.budget import MemoryBudget
from exo.worker.supervisor.memory.memory import Memory


async def test_a_host_that_is_lost_while_memory_is_measured_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = MemoryBudget(Memory(100, {"CUDA0": 70, "gpu2/memory": 50}))

    def measured_late(_: Collection[int]) -> int:
        budget.capacity = Memory(100, {"CUDA0": 70})
        return 90

    monkeypatch.setattr(meter, "usable_ram", measured_late)
    await meter.MemoryMeter(budget, lambda _: None).measure_free()
    assert budget.capacity == Memory(100, {"CUDA0": 70})
