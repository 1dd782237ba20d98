"""Real processes and real signals throughout; the fake runner where no other program is named."""

import signal
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import pytest

from exo.worker.protocol.commands import COMMANDS, Load, Sibling
from exo.worker.protocol.events import Delta, Failed, Finished, PrefillProgress, PromptLogprobs, Status, Usage
from exo.worker.protocol.messages import LINE_BYTES
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.watchdog import Deadlines
from tests.support.fake_model import expected_text
from tests.support.program import ask
from tests.support.runner_pool import pass_gate
from tests.support.runner_process import (
    IDLE,
    LOADED,
    LOADING,
    PROMPT,
    READY,
    answer,
    child,
    collect,
    lines_of,
    ready,
    says,
    script,
    started,
    text_of,
)

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


async def test_any_number_of_watchers_see_the_progress(log: Path, gate: Path) -> None:
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
        await pass_gate(gate)
        await process.ready()
    for statuses in seen.values():
        assert statuses[0].state == "Idle"
        assert Status(state="Loading", layers_loaded=6, total_layers=7) in statuses
        assert {status.state for status in statuses} <= {"Idle", "Loading", "Loaded"}


async def test_a_watcher_may_give_up_a_wait_and_go_on(log: Path, gate: Path) -> None:
    async with started(log, load_gate=str(gate), load_steps=1) as process:
        progress = process.loading()
        while (await anext(progress)).state != "Loading":
            pass
        with anyio.move_on_after(0.01) as wait:
            await anext(progress)
        assert wait.cancelled_caught
        await pass_gate(gate)
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
