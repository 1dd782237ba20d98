import ctypes.util
import re
import subprocess
import sys

import psutil
import pytest

from exo.worker.host import probe_commands, probe_host
from exo.worker.messages import Probe
from exo.worker.runners import RUNNERS

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
    probe = (await probe_host({"abacus": ("sleep", "4321")}, deadline=0.2)).probes["abacus"]
    assert probe.notes == ("the probe of runner abacus did not answer within 0.2 s",)
    assert not [child for child in psutil.Process().children() if "4321" in child.cmdline()]


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
        "import sys, anyio, exo.worker.host as host; anyio.run(host.probe_host)\n"
        "print({'llama_cpp', 'mlx', 'mlx_lm', 'vllm', 'torch', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run(script(source), capture_output=True, check=True, text=True).stdout == "set()\n"
