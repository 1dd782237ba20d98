"""A host that changes while the server runs: runners that answer late or are installed, memory that others free."""

import io
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import anyio
import httpx
import psutil
import pytest
from pydantic import JsonValue
from rich.console import Console

from exo.api.admin.runners import InstanceList
from exo.cards.card import ModelCard
from exo.cli.server.ps import show
from exo.worker.host import updated
from exo.worker.protocol.probe import Probe
from exo.worker.supervisor.host_probe import probe_host
from exo.worker.supervisor.memory.host import usable_memory, usable_ram
from exo.worker.supervisor.memory.memory import Memory
from exo.worker.supervisor.pool import RunnerPool
from exo.worker.supervisor.runner_error import RunnerError
from tests.conftest import fake_card
from tests.support.api_server import serve
from tests.support.fake_runner import COMMAND
from tests.support.nvml import FakeDevice, fake_nvml
from tests.support.program import DEADLINE_SECONDS
from tests.support.runner_pool import ANEW, until

GIB = 1 << 30

SAID = Probe(installed=True, engine="fake", backends=("LlamaCppCpu",))
_RUNNER = """
import os, sys, time
if sys.argv[1:] == ["--probe"]:
    if not os.path.exists({mark!r}):
        {instead}
    print({said!r})
else:
    os.execv({program!r}, {command!r})
"""


def runner(mark: Path, instead: str) -> tuple[str, ...]:
    """The fake runner; where there is no such file yet, its probe does something else."""
    said = SAID.model_dump_json()
    source = _RUNNER.format(mark=str(mark), instead=instead, said=said, program=COMMAND[0], command=COMMAND)
    return (sys.executable, "-c", source)


def complete(url: str) -> httpx.Response:
    body = {"model": "fake/model", "prompt": "once", "max_tokens": 2}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE_SECONDS)


def test_a_request_waits_for_a_runner_whose_first_probe_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exo.serving.hosts.prober.PROBE_SECONDS", 3.0)
    mark = tmp_path / "mark"
    slow = runner(mark, f"open({str(mark)!r}, 'w').close(); time.sleep(1000)")
    with serve(tmp_path, fake_card(), commands={"cuda": slow}) as url:
        reply = complete(url)
        assert (reply.status_code, reply.headers.get("x-exo-runner")) == (200, "cuda")


def test_a_runner_that_is_installed_later_is_found_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exo.serving.hosts.prober._PROBE_AGAIN_SECONDS", 0.0)
    mark = tmp_path / "mark"
    with serve(tmp_path, fake_card(), commands={"cuda": runner(mark, "sys.exit('no engine')")}) as url:
        refused = complete(url)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "runner_unavailable"
        mark.touch()
        assert complete(url).status_code == 200


def test_the_runners_are_not_asked_for_every_request_that_is_refused(tmp_path: Path) -> None:
    mark, asked = tmp_path / "mark", tmp_path / "asked"
    count = runner(mark, f"open({str(asked)!r}, 'a').write('x'); sys.exit('no engine')")
    with serve(tmp_path, fake_card(), commands={"cuda": count}) as url:
        for _ in range(5):
            assert complete(url).status_code == 503
    assert asked.read_text() == "x"


async def test_what_a_runner_answered_once_stands_when_it_is_silent_later() -> None:
    before = await probe_host({"cuda": (sys.executable, "-c", f"print({SAID.model_dump_json()!r})")})
    silent = await probe_host({"cuda": ("sleep", "4321")}, deadline=2)
    assert silent.unanswered == {"cuda"}
    assert not silent.probes["cuda"].installed
    now = updated(before, silent)
    assert (now.probes["cuda"], now.unanswered) == (SAID, frozenset())
    assert updated(silent, before).probes["cuda"] == SAID
    assert updated(silent, silent).unanswered == {"cuda"}


# --- memory of devices; the driver is an invented one, for machines without ---


def use_driver(monkeypatch: pytest.MonkeyPatch, *devices: FakeDevice) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(*devices))


def test_what_could_be_ours_is_what_is_free_and_what_we_have(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.getpid(), 1
    first = FakeDevice(0, used=30 * GIB, processes={ours: 10 * GIB, theirs: 20 * GIB})
    second = FakeDevice(1, used=5 * GIB)
    use_driver(monkeypatch, first, second)
    assert usable_memory(["CUDA0", "CUDA1"], {}) == {"CUDA0": 50 * GIB, "CUDA1": 75 * GIB}
    assert usable_memory(["CUDA0", "CUDA1"], {ours: ["CUDA0"]}) == {"CUDA0": 60 * GIB, "CUDA1": 75 * GIB}
    assert usable_memory(["CUDA0", "CUDA1"], {ours: ["CUDA1"]}) == {"CUDA0": 60 * GIB}, (
        "the driver does not know ours there"
    )
    assert usable_memory(["", "CUDA1"], {}) == {"CUDA1": 75 * GIB}


def wants(gib: int, name: str = "fake/model", **table: JsonValue) -> ModelCard:
    return fake_card(name, on_devices={"CUDA0": gib * GIB}, **table)


async def test_memory_that_another_program_frees_is_used_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_driver(monkeypatch, FakeDevice(0, used=70 * GIB))
    with anyio.fail_after(DEADLINE_SECONDS):
        async with RunnerPool((), tmp_path, {"cuda": COMMAND}) as instances:
            instances.set_capacity(Memory(GIB, {"CUDA0": 10 * GIB}), ["CUDA0"])
            with pytest.raises(RunnerError, match=r"needs .* on CUDA0"):
                await instances.acquire(ANEW, wants(20)).ready()
            use_driver(monkeypatch, FakeDevice(0, used=10 * GIB))
            await instances.acquire(ANEW, wants(20)).ready()


async def test_who_waits_for_a_device_gets_what_another_program_frees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exo.worker.supervisor.memory.meter._MEASURE_SECONDS", 0.1)
    use_driver(monkeypatch, FakeDevice(0, used=40 * GIB))
    with anyio.fail_after(DEADLINE_SECONDS):
        async with RunnerPool((), tmp_path, {"cuda": COMMAND}) as instances:
            instances.set_capacity(Memory(GIB, {"CUDA0": 40 * GIB}), ["CUDA0"])
            first = instances.acquire(ANEW, wants(30, "first"))
            await first.ready()
            use_driver(monkeypatch, FakeDevice(0, used=70 * GIB, processes={first.pid or 0: 30 * GIB}))
            with instances.using(first):
                second = instances.acquire(ANEW, wants(30, "second"))
                await until(lambda: any(each.now.model_id == "second" and each.pid for each in instances.reports()))
                await anyio.sleep(1)
                assert second.capabilities is None
                use_driver(monkeypatch, FakeDevice(0, used=30 * GIB, processes={first.pid or 0: 30 * GIB}))
                await second.ready()
                assert first.failure is None


async def test_ram_that_other_programs_use_is_given_to_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def others_leave(gib: int) -> None:
        def usable(_pids: Collection[int]) -> int:
            return gib * GIB

        monkeypatch.setattr("exo.worker.supervisor.memory.meter.usable_ram", usable)

    others_leave(2)
    card = fake_card(memory=5 * GIB)
    with anyio.fail_after(DEADLINE_SECONDS):
        async with RunnerPool((), tmp_path, {"cuda": COMMAND}) as instances:
            instances.set_capacity(Memory(10 * GIB))
            with pytest.raises(RunnerError, match=r"needs .* bytes of memory"):
                await instances.acquire(ANEW, card).ready()
            others_leave(8)
            await instances.acquire(ANEW, card).ready()
        others_leave(2)
        async with RunnerPool((), tmp_path, {"cuda": COMMAND}) as instances:
            instances.set_capacity(Memory(10 * GIB), ram_is_fixed=True)
            await instances.acquire(ANEW, card).ready()


def test_usable_ram_contains_what_our_processes_have() -> None:
    source = f"held = bytearray(b'x') * {GIB}; print(len(held), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        without, with_it = usable_ram(()), usable_ram([holder.pid])
        holder.communicate(b"\n")
    assert with_it - without > GIB // 2
    assert with_it < psutil.virtual_memory().total


def test_a_server_keeps_saying_that_a_gpu_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_driver(monkeypatch, FakeDevice(0))
    with serve(tmp_path, fake_card()) as url:
        assert complete(url).status_code == 200
        ready, instances = (httpx.get(f"{url}/{path}", timeout=60).json() for path in ("ready", "v1/instances"))
    [notice] = ready["notices"]
    assert notice.startswith("llama.cpp does not use Invented: ")
    assert instances["notices"] == [notice]
    shown = io.StringIO()
    show(InstanceList.model_validate(instances), Console(file=shown, width=200))
    assert shown.getvalue().startswith(notice)
    assert [each.message for each in caplog.records if "Invented" in each.message] == [notice]
