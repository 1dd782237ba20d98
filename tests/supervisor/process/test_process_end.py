"""How a runner's process ends: it dies, hangs, breaks the protocol or is closed; real processes and real signals."""

import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import psutil
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from exo.worker.protocol.commands import Load
from exo.worker.protocol.events import Failed, Finished, Heartbeat, PrefillProgress, Status, Usage
from exo.worker.protocol.wire import encode
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.runner_process import RunnerProcess
from exo.worker.supervisor.watchdog import Deadlines
from tests.support.fake_model import expected_text
from tests.support.fake_runner import COMMAND
from tests.support.program import DEADLINE_SECONDS, ask
from tests.support.runner_process import (
    IDLE,
    IDLE_BEAT,
    LOADED,
    LOADING,
    PROMPT,
    READY,
    RUNNING,
    child,
    collect,
    failure,
    first_text,
    lines_of,
    ready,
    says,
    script,
    started,
)

# --- death ---


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
async def test_a_killed_runner_fails_everything_pending_and_names_the_signal(log: Path, number: signal.Signals) -> None:
    async with ready(log, slots=1, n_ctx=1 << 30) as process, AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(process.generate(ask(name, max_tokens=None))) for name in ("runs", "waits")
        ]
        assert await first_text(streams[0]) == expected_text(PROMPT, 1)
        assert await anext(streams[1]) == PrefillProgress(id="waits", processed=0, total=len(PROMPT))
        child().send_signal(number)
        hint = ", which the kernel does when memory runs out" if number == signal.SIGKILL else ""
        why = Failed(code="runner_died", message=f"the runner was killed by {number.name}{hint}")
        for name, events in zip(("runs", "waits"), streams, strict=True):
            assert (await collect(events))[-1] == why.model_copy(update={"id": name})
        assert process.status.state == "Failed"
        assert process.failure == why
        assert process.pending == 0
        assert await failure(process, "later") == why.model_copy(update={"id": "later"})


async def test_an_exit_is_reported_with_code_and_last_lines(log: Path) -> None:
    async with ready(log, die_after=3, die_with=7) as process:
        failed = await failure(process, "one")
    end = "the end of its standard error:\nthe fake runner dies as ordered"
    assert failed == Failed(id="one", code="runner_died", message=f"the runner exited with code 7; {end}")


async def test_a_stopped_runner_is_missed_and_ended(log: Path) -> None:
    async with started(log, COMMAND, Deadlines(serving=2), n_ctx=1 << 30) as process:
        await process.ready()
        async with process.generate(ask("one", max_tokens=None)) as events:
            await first_text(events)
            child().send_signal(signal.SIGSTOP)
            *_, last = await collect(events)
        assert isinstance(last, Failed)
        assert last.code == "runner_died"
        assert "sent nothing for 2 seconds" in last.message


async def test_a_runner_that_stops_while_it_loads_is_missed_and_ended(log: Path) -> None:
    async with started(log, says(IDLE, LOADING), Deadlines(loading=1)) as process:
        assert "sent nothing for 1 seconds" in (await process.ended()).message


@pytest.mark.parametrize("requests", [{"active": 1, "waiting": 0}, {"active": 0, "waiting": 1}])
async def test_a_runner_that_beats_and_computes_nothing_is_ended(log: Path, requests: dict[str, int]) -> None:
    beat = encode(Heartbeat.model_validate({"steps": 7, **requests}))
    beats = (
        f"for _ in range(1000): sys.stdout.buffer.write({beat!r}); sys.stdout.flush(); __import__('time').sleep(0.1)"
    )
    async with started(log, says(IDLE, LOADING, LOADED, READY, then=beats), Deadlines(serving=60, step=1)) as process:
        assert "computed nothing for 1 seconds" in (await process.ended()).message


async def test_an_idle_runner_may_compute_nothing_for_as_long_as_it_likes(log: Path) -> None:
    """Its heartbeats are further apart than a step may take; what it exits with tells that all were heard."""
    beats = f"""
for _ in range(5):
    __import__("time").sleep(0.05)
    sys.stdout.buffer.write({IDLE_BEAT!r})
    sys.stdout.flush()
os._exit(3)"""
    async with started(log, says(IDLE, LOADING, LOADED, READY, then=beats), Deadlines(step=0.01)) as process:
        assert (await process.ended()).message == "the runner exited with code 3"


@pytest.mark.parametrize(
    ("stderr", "code", "says_plainly"),
    [
        ("CUDA error: out of memory\n  current device: 0", "out_of_memory", "the GPU ran out of memory"),
        ("ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed", "out_of_memory", "the GPU ran out"),
        ("CUDA error: an illegal memory access was encountered", "runner_died", "the GPU reported an error"),
        ("CUDA driver version is insufficient for CUDA runtime", "runner_died", "NVIDIA driver"),
        ("terminate called after throwing std::bad_alloc", "out_of_memory", "this machine ran out of memory"),
        ("OSError: [Errno 12] Cannot allocate memory", "out_of_memory", "this machine ran out of memory"),
        ("memory allocation of 24576 bytes failed", "out_of_memory", "this machine ran out of memory"),
    ],
)
async def test_errors_of_cuda_and_of_memory_are_told_plainly(
    log: Path, stderr: str, code: str, says_plainly: str
) -> None:
    async with started(log, script(f"raise SystemExit({stderr!r})")) as process:
        failed = await process.ended()
    assert failed.code == code
    assert failed.message.startswith("the runner exited with code 1; ")
    assert says_plainly in failed.message
    assert failed.message.endswith(stderr)


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ([b"Hello!\n"], "it wrote b'Hello!'"),
        ([LOADING], "its first message was 'status' instead of the status Idle"),
        ([IDLE, READY], "it went from Idle to Ready"),
        ([IDLE, LOADING, LOADED, IDLE], "it went from Loaded to Idle"),
        ([IDLE, LOADING, LOADED, encode(Status(state="Ready"))], "capabilities must come with the first Ready"),
        ([IDLE, LOADING, LOADED, READY, RUNNING, RUNNING], "it went from Running to Running"),
        (
            [IDLE, LOADING, LOADED, READY, encode(PrefillProgress(id="x", processed=0, total=1))],
            "sent an event of request 'x'",
        ),
        ([IDLE, b'{"type":"status","state":"Loading","mood":"good"}\n'], "mood"),
    ],
)
async def test_a_runner_that_breaks_the_protocol_is_ended(log: Path, lines: list[bytes], what: str) -> None:
    async with started(log, says(*lines)) as process:
        failed = await process.ended()
        assert failed.code == "runner_died"
        assert f"the runner was ended: {what}" in failed.message or what in failed.message
        assert process.status.state == "Failed"
        assert psutil.Process().children() == []


@pytest.mark.parametrize(
    ("say", "what"),
    [
        ("Segmentation fault\n", "it wrote b'Segmentation fault'"),
        (encode(Status(state="Loaded")).decode(), "it went from Running to Loaded"),
    ],
)
async def test_rubbish_in_mid_stream_fails_what_is_pending(log: Path, say: str, what: str) -> None:
    async with ready(log, say_after=3, say=say) as process:
        failed = await failure(process, "one")
        assert (failed.id, failed.code) == ("one", "runner_died")
        assert failed.message.startswith(f"the runner was ended: {what}")


async def test_a_second_terminal_event_is_a_protocol_error(log: Path) -> None:
    end = encode(Finished(id="one", reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=1)))
    async with ready(log, say_after=1, say=(end + end).decode()) as process:
        async with process.generate(ask("one", max_tokens=None)) as events:
            assert isinstance((await collect(events))[-1], Finished)
        failed = await process.ended()
    assert failed.message.startswith("the runner was ended: it sent an event of request 'one'")


async def test_half_a_line_at_the_end_is_the_runners_death_and_not_its_message(log: Path) -> None:
    async with started(log, says(IDLE, b'{"type":"sta', then="os._exit(4)")) as process:
        assert (await process.ended()).message == "the runner exited with code 4"


async def test_a_runner_that_closes_its_output_is_ended(log: Path) -> None:
    async with started(log, says(IDLE, then="os.closerange(3, 99); os.close(1); sys.stdin.read()")) as process:
        assert (await process.ended()).message == "the runner closed its output and did not exit"


async def test_a_runner_that_declares_itself_failed_is_ended(log: Path) -> None:
    lines = encode(Status(state="Failed")), encode(Failed(code="out_of_memory", message="needs 9 GB, has 8"))
    async with started(log, says(IDLE, *lines, then="import time; time.sleep(1000)")) as process:
        assert await process.ended() == Failed(code="out_of_memory", message="needs 9 GB, has 8")


async def test_a_runner_may_fail_before_it_says_anything_else(log: Path) -> None:
    failed = Failed(code="engine_error", message="the driver is too old")
    async with started(log, says(encode(failed), then="")) as process:
        assert await process.ended() == failed


async def test_helpers_that_a_dead_runner_leaves_behind_are_ended(log: Path) -> None:
    helper = "import subprocess; subprocess.Popen(['sleep', '1000']); os._exit(5)"
    async with started(log, says(IDLE, then=helper)) as process:
        assert (await process.ended()).message == "the runner exited with code 5"
        assert not [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", "1000"]]


async def test_an_interrupt_at_the_terminal_does_not_reach_the_runner(log: Path) -> None:
    async with ready(log):
        pid = child().pid
        assert os.getsid(pid) == os.getpgid(pid) == pid != os.getsid(0)


# --- closing ---


async def test_close_shuts_the_runner_down_and_fails_what_is_pending(log: Path) -> None:
    async with ready(log, n_ctx=1 << 30) as process, process.generate(ask("one", max_tokens=None)) as events:
        await first_text(events)
        await process.close()
        last = (await collect(events))[-1]
        assert last == Failed(id="one", code="shutdown", message="the runner is shutting down")
        assert process.status.state == "Shutdown"
        assert process.failure == Failed(code="shutdown", message="the runner was shut down")
        assert (await failure(process, "later")).code == "shutdown"


@pytest.mark.parametrize("stopped", [False, True])
async def test_close_kills_a_runner_that_does_not_listen(log: Path, stopped: bool) -> None:
    async with started(log, COMMAND, Deadlines(grace=0.1), n_ctx=1 << 30, ignore_shutdown=True) as process:
        await process.ready()
        async with process.generate(ask("one", max_tokens=None)) as events:
            await first_text(events)
            if stopped:
                child().send_signal(signal.SIGSTOP)
            await process.close()
            assert (await collect(events))[-1] == Failed(id="one", code="shutdown", message="the runner was shut down")
        assert process.status.state == "Shutdown"


async def test_close_sends_sigterm_before_sigkill(log: Path) -> None:
    wait = "import signal\nsignal.signal(15, lambda *_: (print('took SIGTERM', file=sys.stderr), sys.exit()))\n"
    async with started(
        log, says(IDLE, LOADING, then=wait + "while True: signal.pause()"), Deadlines(grace=1)
    ) as process:
        while process.status.state == "Idle":
            await process.status_after(process.status)
        await process.close()
    assert lines_of(log) == ["took SIGTERM"]


async def test_close_ends_a_runner_that_loads(log: Path, gate: Path) -> None:
    async with started(log, load_gate=str(gate)) as process:
        while process.status.state != "Loading":
            await process.status_after(process.status)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.close)
            tasks.start_soon(process.close)
            with pytest.raises(RunnerError, match="shut down"):
                await process.ready()
        assert process.status.state == "Shutdown"


async def test_close_before_the_process_exists(log: Path) -> None:
    async with started(log) as process:
        await process.close()
        assert process.failure == Failed(code="shutdown", message="the runner was shut down")


async def test_cancelling_run_kills_the_process(log: Path) -> None:
    process = RunnerProcess(COMMAND, Load(model_id="fake/model", backend="LlamaCppCpu"), log)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(process.run)
        await process.ready()
        tasks.cancel_scope.cancel()
    assert psutil.Process().children() == []
    assert process.failure == Failed(code="shutdown", message="the runner was shut down")


SERVER = """
import sys
from pathlib import Path
import anyio, psutil
from exo.worker.protocol.commands import Load
from exo.worker.supervisor.runner_process import RunnerProcess
from tests.support.fake_runner import COMMAND
from tests.support.program import ask

log, gate, uvloop = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "uvloop"

async def serve(name, begun):
    load = Load(model_id="m", backend="LlamaCppCpu", table={"n_ctx": 1 << 30, "load_gate": gate})
    process = RunnerProcess(COMMAND, load, log.with_name(name))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(process.run)
        if gate:
            async for status in process.loading():
                if status.state == "Loading":
                    begun.set()
        await process.ready()
        async with process.generate(ask("endless", max_tokens=None)) as events:
            async for event in events:
                begun.set()

async def main():
    begun = [anyio.Event(), anyio.Event()]
    async with anyio.create_task_group() as tasks:
        for number, event in enumerate(begun):
            tasks.start_soon(serve, str(number), event)
        for event in begun:
            await event.wait()
        print(*(child.pid for child in psutil.Process().children()), flush=True)

anyio.run(main, backend_options={"use_uvloop": uvloop})
"""


def lives(process: psutil.Process) -> bool:
    """An orphan that has exited may stay a zombie for as long as init likes."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("busy", ["loading", "generating"])
async def test_no_runner_outlives_a_server_that_is_killed(
    log: Path, gate: Path, busy: str, anyio_backend: tuple[str, dict[str, bool]]
) -> None:
    loop = "uvloop" if anyio_backend[1]["use_uvloop"] else "asyncio"
    command = (*script(SERVER), str(log), str(gate) if busy == "loading" else "", loop)
    with anyio.fail_after(DEADLINE_SECONDS):
        async with await anyio.open_process(command, stderr=None) as server:
            assert server.stdout is not None
            pids = await BufferedByteReceiveStream(server.stdout).receive_until(b"\n", 99)
            runners = [psutil.Process(int(pid)) for pid in pids.split()]
            assert len(runners) == 2
            server.kill()
            await server.wait()
            with anyio.fail_after(60):
                while any(lives(runner) for runner in runners):  # noqa: ASYNC110 (no event tells of an orphan's end)
                    await anyio.sleep(0.01)


# --- standard error ---


async def test_standard_error_goes_to_the_log_and_its_end_into_the_diagnosis(log: Path) -> None:
    async with ready(log, stderr_lines=20_000, die_after=1, die_with=1) as process:
        message = (await failure(process, "one")).message
    lines = lines_of(log)
    assert lines[:2] == ["line 0 of 20000", "line 1 of 20000"]
    assert lines[-2:] == ["line 19999 of 20000", "the fake runner dies as ordered"]
    assert message.endswith("\n" + "\n".join(lines[-20:]))


async def test_the_log_is_kept_from_one_start_to_the_next_and_is_bounded(log: Path) -> None:
    for number in range(2):
        async with started(log, script(f"raise SystemExit('start {number}')")) as process:
            await process.ended()
    assert lines_of(log) == ["start 0", "start 1"]
    await anyio.Path(log).write_bytes(b"x" * (9 << 20))
    async with started(log, script("raise SystemExit('start 2')")) as process:
        await process.ended()
    assert lines_of(log) == ["start 2"]
