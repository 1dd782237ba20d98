import math
import os
import subprocess
import sys

import psutil
import pytest

from exo.config import Limits
from exo.config_values import SettingsError
from exo.worker.host import Host, NvidiaDevice
from exo.worker.protocol.probe import Device, Probe
from exo.worker.supervisor.memory.host import capacity, memory_of
from exo.worker.supervisor.request_timer import WINDOW_SECONDS, TokenRate
from tests.support.nvml import FakeDevice, fake_nvml

GIB = 1 << 30


def host(memory: int = 1 << 50, nvidia: tuple[NvidiaDevice, ...] = (), devices: tuple[Device, ...] = ()) -> Host:
    probes = {"mlx": Probe(installed=True, engine="MLX", devices=devices)}
    return Host("Linux", "x86_64", 8, memory, memory // 2, nvidia, probes)


@pytest.mark.parametrize(("memory", "left"), [(10 * GIB, GIB), (20 * GIB, 2 * GIB)])
def test_a_share_of_the_memory_is_left_to_everything_else(memory: int, left: int) -> None:
    assert capacity(host(memory)).host in (memory - left, capacity(host()).host)
    assert capacity(host(memory)).host <= memory - left


def test_a_limit_that_is_set_is_the_limit() -> None:
    assert capacity(host(), 5 * GIB).host == 5 * GIB


@pytest.mark.parametrize(
    ("written", "size"),
    [("12GiB", 12 * GIB), ("1.5 gb", 1_500_000_000), ("512M", 512_000_000), ("1073741824", GIB), ("2TiB", 2048 * GIB)],
)
def test_a_limit_is_read_with_its_unit(written: str, size: int) -> None:
    assert Limits.load(memory=written).memory == size


@pytest.mark.parametrize("written", ["0", "much", "-1", "12Gib5", "12 XB", ""])
def test_a_limit_that_is_none_is_refused_by_name(written: str) -> None:
    with pytest.raises(SettingsError, match="--memory-limit: expected a size"):
        Limits.load(memory=written)


def test_limits_are_in_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Limits.load().memory, Limits.load().keep_seconds) == (None, math.inf)
    monkeypatch.setenv("EXO_MEMORY_LIMIT", "8GiB")
    monkeypatch.setenv("EXO_TTL", "300")
    assert (Limits.load().memory, Limits.load().keep_seconds) == (8 * GIB, 300)
    assert Limits.load(memory="4GiB", ttl=0).memory == 4 * GIB


def test_each_device_has_what_was_free_in_the_order_of_the_engines() -> None:
    second = NvidiaDevice("a", "9.0", 80 * GIB, 70 * GIB, id="CUDA1")
    first = NvidiaDevice("b", "9.0", 80 * GIB, 60 * GIB, id="CUDA0")
    hidden = NvidiaDevice("c", "9.0", 80 * GIB, 80 * GIB)
    eleventh = NvidiaDevice("d", "9.0", 80 * GIB, 50 * GIB, id="CUDA10")
    devices = capacity(host(nvidia=(eleventh, second, hidden, first))).devices
    assert list(devices.items()) == [("CUDA0", 60 * GIB), ("CUDA1", 70 * GIB), ("CUDA10", 50 * GIB)]


def test_metal_has_what_its_probe_says_and_processors_are_no_device() -> None:
    metal = Device(name="M4", backend="MlxMetal", memory_total=24 * GIB)
    processors = Device(name="CPU", backend="MlxCpu", memory_total=32 * GIB)
    assert capacity(host(devices=(metal, processors))).devices == {"M4": 24 * GIB}
    assert capacity(host()).devices == {}


def test_what_a_process_has_is_its_resident_memory_and_that_of_its_children() -> None:
    gone = 1 << 22
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found = memory_of([os.getpid(), child.pid, gone])
        alone = psutil.Process().memory_info().rss
        child.kill()
    assert found.keys() == {os.getpid(), child.pid}
    assert found[child.pid].host > 0
    assert found[os.getpid()].host == pytest.approx(alone + found[child.pid].host, rel=0.05)


def test_what_a_process_and_its_children_have_is_told_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        ours, theirs = os.getpid(), 1
        first = FakeDevice(0xC1, processes={ours: 5, child.pid: 7, theirs: 100})
        hidden = FakeDevice(0x01, processes={ours: 50})
        second = FakeDevice(0x41, processes={child.pid: 11})
        monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(first, hidden, second))
        found = memory_of([ours, child.pid], ["CUDA1", "", "CUDA0"])
        child.kill()
    assert found[child.pid].devices == {"CUDA1": 7, "CUDA0": 11}
    assert found[ours].devices == {"CUDA1": 12, "CUDA0": 11}


def test_the_rate_is_over_the_last_seconds() -> None:
    rate = TokenRate()
    assert rate.per_second(0) == 0
    for tenth in range(40):
        rate.add(2, tenth / 10)
    assert rate.per_second(4) == pytest.approx(20)
    assert 0 < rate.per_second(4 + WINDOW_SECONDS - 1) < 20
    assert rate.per_second(4 + WINDOW_SECONDS) == 0


def test_the_first_tokens_are_no_burst() -> None:
    rate = TokenRate()
    rate.add(3, 10.0)
    assert rate.per_second(10.001) == 3
