"""Real processes and real signals throughout; the fake runner where no other program is named."""

import os
import signal
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import psutil
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from pydantic import JsonValue

from exo.worker.protocol.commands import COMMANDS, Load, Sibling
from exo.worker.protocol.events import (
    Capabilities,
    Delta,
    Failed,
    Finished,
    Heartbeat,
    PrefillProgress,
    PromptLogprobs,
    Status,
    Usage,
)
from exo.worker.protocol.messages import LINE_BYTES
from exo.worker.protocol.wire import encode
from exo.worker.supervisor.runner_process import RunnerError, RunnerProcess
from exo.worker.supervisor.state_machine import RequestEvent, RequestEvents
from exo.worker.supervisor.watchdog import Deadlines
from tests.support.fake_runner import COMMAND, expected_text
from tests.support.program import DEADLINE_SECONDS, ask

PROMPT = "once upon a time"
PATIENT = Deadlines(grace=10)


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """The two loops handle subprocesses differently, and the server may run on either."""
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "runner.log"


@asynccontextmanager
async def started(
    log: Path, command: Sequence[str] = COMMAND, deadlines: Deadlines = PATIENT, **table: JsonValue
) -> AsyncGenerator[RunnerProcess]:
    load = Load(model_id="fake/model", backend="LlamaCppCpu", table=table)
    process = RunnerProcess(command, load, log, deadlines)
    with anyio.fail_after(DEADLINE_SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.run)
            yield process
            await process.close()
    assert psutil.Process().children(recursive=True) == []


@asynccontextmanager
async def ready(log: Path, **table: JsonValue) -> AsyncGenerator[RunnerProcess]:
    async with started(log, COMMAND, PATIENT, **table) as process:
        await process.ready()
        yield process


def child() -> psutil.Process:
    (found,) = psutil.Process().children()
    return found


async def collect(events: RequestEvents) -> list[RequestEvent]:
    return [event async for event in events]


async def answer(process: RunnerProcess, name: str, prompt: str = PROMPT, max_tokens: int | None = 16) -> str:
    async with process.generate(ask(name, prompt, max_tokens=max_tokens)) as events:
        received = await collect(events)
    assert isinstance(received[-1], Finished), received[-1]
    return text_of(received)


async def failure(process: RunnerProcess, name: str) -> Failed:
    """How an endless request ends."""
    async with process.generate(ask(name, max_tokens=None)) as events:
        *_, last = await collect(events)
    assert isinstance(last, Failed)
    return last


async def first_text(events: RequestEvents) -> str:
    """Reads as far as the first text, so that what follows falls within the stream."""
    async for event in events:
        if isinstance(event, Delta) and event.text:
            return event.text
    pytest.fail("the stream has ended")


def text_of(events: Sequence[RequestEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta | Finished))


def script(source: str) -> tuple[str, ...]:
    return (sys.executable, "-c", source)


def says(*lines: bytes, then: str = "sys.stdin.read()") -> tuple[str, ...]:
    """A program that says this at once, whatever it is told."""
    return script(f"import sys, os\nsys.stdout.buffer.write({b''.join(lines)!r})\nsys.stdout.flush()\n{then}")


def lines_of(log: Path) -> list[str]:
    return log.read_text().splitlines()


async def open_gate(gate: Path) -> None:
    """Lets a load that waits at the FIFO ``gate`` go on."""
    await anyio.Path(gate).write_bytes(b"")


# --- loading ---


async def test_a_runner_loads_and_tells_what_it_can_do(log: Path) -> None:
    async with started(log, slots=3, n_ctx=99) as process:
        capabilities = await process.ready()
        assert (capabilities.engine, capabilities.slots, capabilities.context_length) == ("fake", 3, 99)
        assert capabilities.backend == "LlamaCppCpu"
        assert process.capabilities == capabilities
        assert process.status.state == "Ready"
        assert process.failure is None


async def test_logprobs_come_with_the_events(log: Path) -> None:
    asked = ask("one", PROMPT, max_tokens=3).model_copy(update={"logprobs": 2, "prompt_logprobs": 1})
    async with ready(log) as process, process.generate(asked) as events:
        received = await collect(events)
    kinds = [type(event) for event in received if not isinstance(event, PrefillProgress)]
    assert kinds == [PromptLogprobs, Delta, Delta, Delta, Finished]
    told = next(event for event in received if isinstance(event, PromptLogprobs))
    assert len(told.items) == len(PROMPT)
    assert all(len(event.logprobs[0].top) == 2 for event in received if isinstance(event, Delta))


async def test_any_number_of_watchers_see_the_progress(log: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    seen: dict[int, list[Status]] = {0: [], 1: []}
    at_gate = anyio.Event()

    async def watch(number: int) -> None:
        async for status in process.loading():
            seen[number].append(status)
            if all(each and each[-1].layers_loaded == 6 for each in seen.values()):
                at_gate.set()

    async with started(log, load_gate=str(gate), load_steps=7) as process, anyio.create_task_group() as tasks:
        for number in seen:
            tasks.start_soon(watch, number)
        await at_gate.wait()
        await open_gate(gate)
        await process.ready()
    for statuses in seen.values():
        assert statuses[0].state == "Idle"
        assert Status(state="Loading", layers_loaded=6, total_layers=7) in statuses
        assert {status.state for status in statuses} <= {"Idle", "Loading", "Loaded"}


async def test_a_watcher_may_give_up_a_wait_and_go_on(log: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with started(log, load_gate=str(gate), load_steps=1) as process:
        progress = process.loading()
        while (await anext(progress)).state != "Loading":
            pass
        with anyio.move_on_after(0.01) as wait:
            await anext(progress)
        assert wait.cancelled_caught
        await open_gate(gate)
        assert [status.state async for status in progress] in (["Loaded"], [])
        assert process.status.state == "Ready"


async def test_a_load_that_fails_keeps_the_runners_code_and_message(log: Path) -> None:
    async with started(log, fail_load="no such file: model.gguf") as process:
        with pytest.raises(RunnerError, match=r"no such file: model\.gguf") as caught:
            await process.ready()
        assert caught.value.failed == Failed(code="model_load_failed", message="no such file: model.gguf")
        assert process.failure == caught.value.failed
        assert process.status.state == "Failed"
        assert [status async for status in process.loading()] == []


async def test_a_program_that_says_nothing_is_ended(log: Path) -> None:
    async with started(log, script("import time; time.sleep(1000)"), Deadlines(handshake=0.2)) as process:
        with pytest.raises(RunnerError, match=r"sent nothing within 0\.2 seconds") as caught:
            await process.ready()
        assert caught.value.failed.code == "runner_died"


async def test_a_program_that_does_not_exist_is_a_failure_with_its_name(log: Path) -> None:
    async with started(log, ("no-such-program",)) as process:
        with pytest.raises(RunnerError, match=r"no-such-program could not be started: .*No such file"):
            await process.ready()


async def test_a_log_that_cannot_be_written_goes_to_standard_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("in the way")
    for name in ("one", "two"):
        async with started(
            tmp_path / "logs" / f"{name}.log", script(f"raise SystemExit('{name} was here')")
        ) as process:
            with pytest.raises(RunnerError, match=f"{name} was here"):
                await process.ready()
    assert capfd.readouterr().err == "one was here\ntwo was here\n"
    assert caplog.text.count("go to standard error") == 1


async def test_a_program_that_exits_at_once_is_diagnosed(log: Path) -> None:
    async with started(log, script("raise SystemExit('module llama_cpp not found')")) as process:
        with pytest.raises(RunnerError) as caught:
            await process.ready()
    message = "the runner exited with code 1; the end of its standard error:\nmodule llama_cpp not found"
    assert caught.value.failed == Failed(code="runner_died", message=message)


# --- requests ---


async def test_a_request_streams_its_tokens_and_ends_once(log: Path) -> None:
    async with ready(log) as process, process.generate(ask("one", PROMPT, max_tokens=40)) as events:
        received = await collect(events)
        assert await collect(events) == []
    assert received[0] == PrefillProgress(id="one", processed=0, total=len(PROMPT))
    assert text_of(received) == expected_text(PROMPT, 40)
    tokens = [token for event in received if isinstance(event, Delta) for token in event.tokens]
    assert bytes(tokens).decode() == expected_text(PROMPT, 40)
    usage = Usage(prompt_tokens=len(PROMPT), completion_tokens=40)
    assert received[-1] == Finished(id="one", reason="length", usage=usage)
    assert sum(isinstance(event, Finished | Failed) for event in received) == 1


async def test_concurrent_requests_get_their_own_tokens(log: Path) -> None:
    texts: dict[str, str] = {}

    async def run(prompt: str) -> None:
        texts[prompt] = await answer(process, f"id-{prompt}", prompt, 100)

    prompts = [f"prompt {number}" for number in range(32)]
    async with ready(log, slots=8) as process:
        async with anyio.create_task_group() as tasks:
            for prompt in prompts:
                tasks.start_soon(run, prompt)
        assert process.pending == 0
    assert texts == {prompt: expected_text(prompt, 100) for prompt in prompts}


async def test_a_refused_request_ends_no_other(log: Path) -> None:
    async with ready(log, n_ctx=30) as process, process.generate(ask("good", "short", max_tokens=20)) as good:
        async with process.generate(ask("bad", "x" * 30)) as bad:
            (refusal,) = await collect(bad)
        assert isinstance(refusal, Failed)
        assert (refusal.id, refusal.code, refusal.param) == ("bad", "context_length_exceeded", "prompt")
        assert text_of(await collect(good)) == expected_text("short", 20)


async def test_leaving_early_cancels_once_and_frees_the_slot(log: Path) -> None:
    async with ready(log, slots=1, n_ctx=1 << 30, log_commands=True) as process:
        async with process.generate(ask("left", max_tokens=None)) as events:
            await anext(events)
        assert await collect(events) == []
        assert await answer(process, "next") == expected_text(PROMPT, 16)
        assert process.pending == 0
    assert lines_of(log).count("cancel left") == 1
    assert "cancel next" not in lines_of(log)


async def test_a_cancelled_task_still_cancels_its_request(log: Path) -> None:
    async with ready(log, slots=1, n_ctx=1 << 30, log_commands=True) as process:
        with anyio.CancelScope() as client:
            async with process.generate(ask("gone", max_tokens=None)) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        client.cancel()
        assert client.cancelled_caught
        assert await answer(process, "next") == expected_text(PROMPT, 16)
    assert lines_of(log).count("cancel gone") == 1


async def test_a_task_cancelled_before_its_first_wait_leaves_nothing_behind(log: Path) -> None:
    async with ready(log, slots=1, n_ctx=1 << 30) as process:
        with anyio.CancelScope() as client:
            client.cancel()
            async with process.generate(ask("gone", max_tokens=None)) as events:
                await collect(events)
        assert await answer(process, "next") == expected_text(PROMPT, 16)
        assert process.pending == 0


async def test_leaving_does_not_wait_for_a_runner_that_hangs(log: Path) -> None:
    async with ready(log, n_ctx=1 << 30) as process:
        async with process.generate(ask("left", max_tokens=None)) as events:
            await anext(events)
            child().send_signal(signal.SIGSTOP)
            for number in range(50):
                async with process.generate(ask(f"long-{number}", "x" * 100_000)):
                    pass
        child().send_signal(signal.SIGCONT)
        assert await answer(process, "next") == expected_text(PROMPT, 16)


async def test_a_request_id_in_use_and_a_request_before_ready_are_mistakes_of_the_caller(log: Path) -> None:
    async with started(log) as process, AsyncExitStack() as stack:
        with pytest.raises(RuntimeError, match="before ready"):
            async with process.generate(ask("early")):
                pass
        await process.ready()
        async with process.generate(ask("same")) as events:
            with pytest.raises(ValueError, match="'same' is in use"):
                async with process.generate(ask("same")):
                    pass
            assert isinstance((await collect(events))[-1], Finished)
            successor = await stack.enter_async_context(process.generate(ask("same")))
        assert text_of(await collect(successor)) == expected_text(PROMPT, 16)


async def test_a_reader_that_lags_loses_nothing_and_holds_up_nobody(log: Path) -> None:
    async with ready(log, n_ctx=1 << 20) as process, process.generate(ask("slow", max_tokens=5000)) as slow:
        while process.pending:
            assert await answer(process, "other", max_tokens=100) == expected_text(PROMPT, 100)
        received = await collect(slow)
    assert len(received) < 5000
    assert isinstance(received[0], PrefillProgress)
    assert text_of(received) == expected_text(PROMPT, 5000)
    assert isinstance(received[-1], Finished)


# --- a full pipe ---

LARGE = "a" * 200_000


async def test_requests_wait_while_the_pipe_is_full_and_a_cancel_passes_them_by(log: Path) -> None:
    async with ready(log, log_commands=True, step_seconds=0.01) as process, AsyncExitStack() as stack:
        async with process.generate(ask("running", PROMPT, max_tokens=4000)) as running:
            await anext(running)
            child().suspend()
            names = [f"large-{number}" for number in range(20)]
            waiting = [await stack.enter_async_context(process.generate(ask(each, LARGE))) for each in names]
            async with process.generate(ask("left", LARGE)):
                await anyio.sleep(0.05)
        await anyio.sleep(0.05)
        child().resume()
        for events in waiting:
            end = (await collect(events))[-1]
            assert isinstance(end, Failed)
            assert end.code == "context_length_exceeded"
    commands = [line.split() for line in lines_of(log) if line.startswith(("generate ", "cancel "))]
    assert commands.index(["cancel", "running"]) < commands.index(["generate", names[-1]])
    assert [name for kind, name in commands if kind == "generate"] == ["running", *names]
    assert ["cancel", "left"] not in commands


async def test_a_prompt_of_several_sequences_is_written_once(log: Path, tmp_path: Path) -> None:
    file = tmp_path / "commands"
    keep = f"with open({str(file)!r}, 'wb') as file: file.writelines(sys.stdin.buffer.readline() for _ in range(3))"
    first = ask("one", LARGE, seed=1)
    alike = [
        first.model_copy(update={"id": name, "sampling": first.sampling.model_copy(update={"seed": seed})})
        for name, seed in (("two", 2), ("three", 3))
    ]
    other = first.model_copy(update={"id": "other", "max_tokens": 3})
    async with started(log, says(IDLE, LOADING, LOADED, READY, then=keep)) as process, AsyncExitStack() as stack:
        await process.ready()
        for request in (first, other, *alike):
            await stack.enter_async_context(process.generate(request))
        assert process.pending == 4
        await process.ended()
    load, joined, alone = [COMMANDS.validate_json(line) for line in file.read_bytes().splitlines()]
    assert isinstance(load, Load)
    siblings = tuple(Sibling(id=each.id, seed=each.sampling.seed) for each in alike)
    assert joined == first.model_copy(update={"also": siblings})
    assert alone == other


async def test_a_request_that_is_too_long_for_a_line_fails_alone(log: Path) -> None:
    async with ready(log) as process:
        async with process.generate(ask("huge", "a" * LINE_BYTES)) as events:
            (end,) = await collect(events)
        assert isinstance(end, Failed)
        assert end.code == "invalid_request"
        assert str(LINE_BYTES) in end.message
        async with process.generate(ask("good", PROMPT, max_tokens=3)) as events:
            assert isinstance((await collect(events))[-1], Finished)


async def test_requests_that_wait_for_a_full_pipe_fail_when_the_runner_dies(log: Path) -> None:
    async with ready(log) as process, AsyncExitStack() as stack:
        child().suspend()
        requests = [process.generate(ask(f"large-{number}", LARGE)) for number in range(5)]
        waiting = [await stack.enter_async_context(each) for each in requests]
        await anyio.sleep(0.05)
        child().kill()
        for events in waiting:
            end = (await collect(events))[-1]
            assert isinstance(end, Failed)
            assert end.code == "runner_died"


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


IDLE = encode(Status(state="Idle"))
IDLE_BEAT = encode(Heartbeat(steps=7, active=0, waiting=0))
LOADING = encode(Status(state="Loading"))
LOADED = encode(Status(state="Loaded"))
CAPABILITIES = Capabilities(engine="x", engine_version="1", backend="x", context_length=9, slots=1, vocabulary=9)
READY = encode(Status(state="Ready", capabilities=CAPABILITIES))
RUNNING = encode(Status(state="Running"))


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ([b"Hello!\n"], "it wrote b'Hello!'"),
        ([LOADING], "its first message was 'status' instead of the status Idle"),
        ([IDLE, READY], "it went from Idle to Ready"),
        ([IDLE, LOADING, LOADED, LOADING], "it went from Loaded to Loading"),
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


async def test_close_ends_a_runner_that_loads(log: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
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
    log: Path, tmp_path: Path, busy: str, anyio_backend: tuple[str, dict[str, bool]]
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
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
            with anyio.fail_after(5):
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
