import ctypes.util
import re
import subprocess
import sys
from dataclasses import replace

import anyio
import anyio.lowlevel
import psutil
import pytest

from exo.cli.doctor.command import as_text
from exo.worker.host import Host, NvidiaDevice, unused_gpus, with_engine_names
from exo.worker.protocol.probe import Device, Probe
from exo.worker.protocol.runners import RUNNERS
from exo.worker.supervisor.host_probe import probe_commands, probe_host
from tests.support.nvml import FakeDevice, fake_nvml

ANSWER = Probe(installed=True, engine="abacus", version="1", backends=("AbacusWood",))


def script(source: str) -> tuple[str, ...]:
    return (sys.executable, "-c", source)


def answering(after: str = "") -> tuple[str, ...]:
    return script(f"print({ANSWER.model_dump_json()!r}, flush=True)\n{after}")


async def test_the_machine_is_what_the_system_says() -> None:
    host = await probe_host({})
    assert host.system in ("Linux", "Darwin")
    assert host.machine
    assert host.cpu_count >= 1
    assert 0 < host.memory_available <= host.memory_total == psutil.virtual_memory().total
    assert host.probes == {}


async def test_nvidia_devices_are_listed_where_there_is_a_driver_and_none_elsewhere() -> None:
    devices = (await probe_host({})).nvidia_devices
    if ctypes.util.find_library("nvidia-ml") is None:
        assert devices == ()
    for device in devices:
        assert device.name
        assert 0 <= device.memory_free <= device.memory_total
        assert float(device.compute_capability) > 3


def nvidia(address: str) -> NvidiaDevice:
    return NvidiaDevice("H100", "9.0", 80, 70, address)


def cuda(name: str, address: str) -> Device:
    return Device(name=name, backend="LlamaCppCuda", address=address)


def test_devices_are_called_what_engines_call_them_wherever_they_are_in_the_drivers_order() -> None:
    devices = (nvidia("0000:01:00.0"), nvidia("0000:41:00.0"), nvidia("0000:c1:00.0"))
    seen = (cuda("CUDA0", "0000:c1:00.0"), cuda("CUDA1", "0000:01:00.0"), Device(name="CPU", backend="LlamaCppCpu"))
    with_llama = Probe(installed=True, engine="llama.cpp", devices=seen)
    assert [each.id for each in with_engine_names(devices, [ANSWER, with_llama])] == ["CUDA1", "", "CUDA0"]
    assert [each.id for each in with_engine_names(devices, [ANSWER])] == ["CUDA0", "CUDA1", "CUDA2"]


async def test_what_the_driver_says_of_each_device_is_joined_with_what_an_engine_calls_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(FakeDevice(0x41, used=3), FakeDevice(0xC1)))
    seen = (cuda("CUDA0", "0000:c1:00.0"), cuda("CUDA1", "0000:41:00.0"))
    answer = Probe(installed=True, engine="llama.cpp", devices=seen).model_dump_json()
    first, second = (await probe_host({"cuda": script(f"print({answer!r})")})).nvidia_devices
    assert (first.id, first.address, second.id, second.address) == ("CUDA1", "0000:41:00.0", "CUDA0", "0000:c1:00.0")
    assert first.memory_total - first.memory_free == 3


def test_the_doctor_tells_how_much_of_each_device_is_in_use() -> None:
    gib = 1 << 30
    used = NvidiaDevice("H100", "9.0", 80 * gib, 50 * gib, "0000:c1:00.0", "CUDA1")
    hidden = NvidiaDevice("A2", "8.6", 16 * gib, 16 * gib, "0000:01:00.0")
    machine = Host("Linux", "x86_64", 8, gib, gib, (used, hidden), {})
    first, second = [line for line in as_text(machine) if line.startswith("NVIDIA")]
    assert first == ("NVIDIA    CUDA1: H100, compute capability 9.0, at 0000:c1:00.0, 30.0 GiB in use of 80.0 GiB")
    assert "hidden from engines: A2" in second


async def test_every_runner_is_asked_and_one_that_fails_harms_no_other() -> None:
    silent, other = script("import sys; sys.exit('no engine')"), answering()
    host = await probe_host({"one": silent, "two": other, "three": other})
    assert host.probes["two"] == host.probes["three"] == ANSWER
    assert list(host.probes) == ["one", "two", "three"]
    assert not host.probes["one"].installed


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (script("import no_such_engine"), "ended with status 1 .*No module named 'no_such_engine'"),
        (script("pass"), "gave no answer: nothing on standard error"),
        (script("print('ready!')"), "gave no answer"),
        (script("print('{\"installed\": true}')"), "gave no answer"),
        (script(f"print({ANSWER.model_dump_json()!r} * 2)"), "gave no answer"),
        (script("import sys; sys.stdout.buffer.write(bytes(range(256)))"), "gave no answer"),
        (script("import os; os.kill(os.getpid(), 11)"), "ended with status -11"),
        (("/no/such/program",), "did not start: .*No such file"),
    ],
)
async def test_a_probe_without_a_usable_answer_counts_as_not_installed(command: tuple[str, ...], why: str) -> None:
    probe = (await probe_host({"abacus": command})).probes["abacus"]
    assert not probe.installed
    assert probe.backends == ()
    (note,) = probe.notes
    assert re.match(f"the probe of runner abacus {why}", note)


async def test_an_answer_stands_even_if_the_engine_crashes_on_its_way_out() -> None:
    host = await probe_host({"abacus": answering("import os; os.abort()")})
    assert host.probes["abacus"] == ANSWER


async def test_a_probe_that_hangs_is_killed_at_the_deadline() -> None:
    probe = (await probe_host({"abacus": ("sleep", "4321")}, deadline=2)).probes["abacus"]
    assert probe.notes == ("the probe of runner abacus did not answer within 2 s",)
    assert not [child for child in psutil.Process().children() if "4321" in child.cmdline()]


async def test_a_probe_that_is_given_up_while_its_process_starts_leaves_none() -> None:
    for turns in range(12):  # of the event loop, which starts a process within a few
        before = {*psutil.Process().children()}
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(probe_host, {"abacus": ("sleep", "4321")})
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        assert {*psutil.Process().children()} <= before


async def test_every_real_runner_answers_in_one_line_without_its_engine_here() -> None:
    commands = probe_commands()
    assert commands.keys() == RUNNERS.keys()
    host = await probe_host()
    for name, spec in RUNNERS.items():
        probe = host.probes[name]
        assert set(probe.backends) <= set(spec.backends)
        assert probe.installed or probe.notes


def test_probing_imports_no_engine() -> None:
    source = (
        "import sys, anyio, exo.worker.supervisor.host_probe as host; anyio.run(host.probe_host)\n"
        "print({'llama_cpp', 'mlx', 'mlx_lm', 'vllm', 'torch', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run(script(source), capture_output=True, check=True, text=True).stdout == "set()\n"


# --- a GPU that is here and not used ---


def with_probe(*devices: NvidiaDevice, backends: tuple[str, ...] = ("LlamaCppCpu",)) -> Host:
    probe = Probe(installed=True, engine="llama.cpp", backends=backends, notes=("no plug-in",), remedy="exo setup cuda")
    return Host("Linux", "x86_64", 8, 1, 1, devices, {"cuda": probe})


def test_a_gpu_that_llama_cpp_does_not_use_is_named_with_reason_and_remedy() -> None:
    gpu = NvidiaDevice("RTX 4090", "8.9", 24, 24)
    expected = "llama.cpp does not use RTX 4090: no plug-in; to fix it: exo setup cuda"
    assert unused_gpus(with_probe(gpu, gpu)) == expected
    assert unused_gpus(with_probe()) == ""
    assert unused_gpus(with_probe(gpu, backends=("LlamaCppCuda", "LlamaCppCpu"))) == ""


def test_a_driver_that_does_not_answer_is_a_gpu_that_is_not_used() -> None:
    broken = replace(with_probe(), driver_problem="the NVIDIA driver does not answer: version mismatch")
    assert unused_gpus(broken) == "the NVIDIA driver does not answer: version mismatch; models run on the CPU"
    assert "NVIDIA    the NVIDIA driver does not answer: version mismatch" in list(as_text(broken))
