"""The energy of GPUs between two times, from readings of their counters."""

import sys
from threading import Event
from types import ModuleType

import anyio
import pytest
from anyio.to_thread import run_sync

from exo.worker.supervisor.gpu_energy import GpuEnergy, energy_at
from tests.support.nvml import FakeDevice, fake_nvml

READINGS = [(1000, 5.0), (2000, 7.0), (4000, 8.0)]


@pytest.mark.parametrize(
    ("when", "expected"), [(0, 3.0), (1000, 5.0), (1500, 6.0), (2000, 7.0), (3000, 7.5), (4000, 8.0), (6000, 9.0)]
)
def test_the_counter_is_interpolated_and_goes_on_at_the_same_rate(when: int, expected: float) -> None:
    assert energy_at(READINGS, when) == expected


def lacks_the_counter() -> ModuleType:
    nvml = fake_nvml(FakeDevice(0x41))

    def energy(_: FakeDevice) -> int:
        raise nvml.NVMLError_NotSupported

    nvml.__dict__["nvmlDeviceGetTotalEnergyConsumption"] = energy
    return nvml


@pytest.mark.parametrize("nvml", [fake_nvml(), lacks_the_counter()])
def test_without_a_counter_there_is_no_energy(nvml: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

    async def followed() -> float | None:
        energy = GpuEnergy()
        async with energy.followed():
            pass
        return energy.joules(0, 1)

    assert anyio.run(followed) is None


def test_all_gpus_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second GPU takes twice as much as the first."""
    counted, fourth = {0x41: 0, 0xC1: 0}, Event()
    nvml = fake_nvml(*map(FakeDevice, counted))

    def energy(device: FakeDevice) -> int:
        counted[device.bus] += 1000 if device.bus == 0x41 else 2000
        if counted[0x41] == 4000:
            fourth.set()
        return counted[device.bus]

    nvml.__dict__["nvmlDeviceGetTotalEnergyConsumption"] = energy
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

    async def followed() -> list[tuple[int, float]]:
        energy = GpuEnergy()
        async with energy.followed():
            assert await run_sync(fourth.wait, 300)
        return energy.readings[:3]

    assert [joules for _, joules in anyio.run(followed)] == [3.0, 6.0, 9.0]
