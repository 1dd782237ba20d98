"""``RunnerProcess.ask``: one command, one answer, and every way in which none comes."""

import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Embed, Load, Rank, Text, Tokenize
from exo.worker.protocol.events import Capabilities, Delta, Embedded, Finished, Status, Usage
from exo.worker.protocol.wire import encode
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.runner_process import Deadlines, RunnerProcess
from tests.support.fake_model import score_of, tokenize, vector_of
from tests.support.fake_runner import COMMAND
from tests.support.program import DEADLINE_SECONDS, ask, names

name = names()


@asynccontextmanager
async def ready(log: Path, command: tuple[str, ...] = COMMAND, **table: JsonValue) -> AsyncGenerator[RunnerProcess]:
    load = Load(model_id="fake/model", backend="LlamaCppCpu", table=table)
    process = RunnerProcess(command, load, log / "runner.log", Deadlines(grace=10))
    with anyio.fail_after(DEADLINE_SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.run)
            await process.ready()
            yield process
            await process.close()


def embed(text: str) -> Embed:
    return Embed(id=next(name), prompt=(Text(text=text),))


def vector(text: str) -> tuple[float, ...]:
    return vector_of(tokenize([Text(text=text)]))


async def refused(process: RunnerProcess, command: Embed | Rank | Tokenize) -> RunnerError:
    with pytest.raises(RunnerError) as error:
        await process.ask(command)
    return error.value


async def test_each_command_has_its_answer(tmp_path: Path) -> None:
    async with ready(tmp_path) as process:
        assert not process.produced_output.is_set()
        tokens = await process.ask(Tokenize(id=next(name), prompt=(Text(text="abc"),)))
        assert tokens.tokens == (97, 98, 99)
        assert not process.produced_output.is_set()
        assert (await process.ask(embed("abc"))).vector == vector("abc")
        assert process.produced_output.is_set()
        scored = await process.ask(Rank(id=next(name), query="a b c", document="b c d"))
        assert scored.score == score_of("a b c", "b c d")
        assert process.pending == 0


async def test_many_at_once_get_their_own_answers(tmp_path: Path) -> None:
    answers: dict[str, tuple[float, ...]] = {}

    async def one(text: str) -> None:
        answers[text] = (await process.ask(embed(text))).vector

    async with ready(tmp_path) as process, anyio.create_task_group() as tasks:
        for index in range(50):
            tasks.start_soon(one, f"text {index}")
    assert answers == {text: vector(text) for text in (f"text {index}" for index in range(50))}


async def test_a_refusal_is_no_death_and_leaves_the_others_alone(tmp_path: Path) -> None:
    async with ready(tmp_path) as process:
        error = await refused(process, embed(""))
        assert (error.failed.code, error.failed.param) == ("invalid_request", "prompt")
        assert not process.died_of(error.failed)
        assert (await process.ask(embed("good"))).vector == vector("good")


async def test_one_who_no_longer_waits_cancels_the_command(tmp_path: Path) -> None:
    questions = [embed(f"text {index}") for index in range(40)]
    async with ready(tmp_path, step_seconds=0.05, log_commands=True) as process:
        async with anyio.create_task_group() as tasks:
            for question in questions:
                tasks.start_soon(process.ask, question)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        assert (await process.ask(embed("after"))).vector == vector("after")
        assert process.pending == 0
    commands = (tmp_path / "runner.log").read_text().splitlines()
    assert {f"cancel {question.id}" for question in questions[20:]} <= {*commands}


async def test_a_runner_that_dies_fails_the_command_and_says_it_died(tmp_path: Path) -> None:
    errors: list[RunnerError] = []
    async with ready(tmp_path, step_seconds=60) as process, anyio.create_task_group() as tasks:

        async def fails() -> None:
            errors.append(await refused(process, embed("text")))

        for _ in range(3):
            tasks.start_soon(fails)
        await anyio.wait_all_tasks_blocked()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        await process.ended()
        errors.append(await refused(process, embed("too late")))
    assert [error.failed.code for error in errors] == ["runner_died"] * 4
    assert all(process.died_of(error.failed) for error in errors)


async def test_a_death_in_the_middle_spares_what_was_answered(tmp_path: Path) -> None:
    async with ready(tmp_path, die_after=3) as process:
        for index in range(2):
            assert (await process.ask(embed(f"text {index}"))).vector == vector(f"text {index}")
        error = await refused(process, embed("the third"))
        assert error.failed.code == "runner_died"
        assert process.died_of(error.failed)


async def test_closing_the_runner_fails_the_command(tmp_path: Path) -> None:
    ends: list[str] = []

    async def one(process: RunnerProcess) -> None:
        try:
            ends.append((await process.ask(embed("text"))).type)
        except RunnerError as error:
            ends.append(error.failed.code)

    async with ready(tmp_path, step_seconds=0.2) as process, anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(one, process)
        await anyio.wait_all_tasks_blocked()
        await process.close()
    assert len(ends) == 20
    assert set(ends[10:]) == {"shutdown"}


async def test_streams_and_questions_share_a_runner(tmp_path: Path) -> None:
    async with ready(tmp_path) as process, process.generate(ask(next(name), max_tokens=30)) as events:
        assert (await process.ask(embed("text"))).vector == vector("text")
        received = [event async for event in events]
    assert isinstance(received[-1], Finished)
    assert sum(len(event.tokens) for event in received if isinstance(event, Delta)) == 30


@pytest.mark.parametrize("wrong", ["kind", "stream", "nobody"])
async def test_a_runner_that_answers_what_was_not_asked_is_ended(tmp_path: Path, wrong: str) -> None:
    question = embed("text")
    capabilities = Capabilities(
        engine="liar", engine_version="1", backend="LlamaCppCpu", context_length=9, slots=1, vocabulary=9
    )
    usage = Usage(prompt_tokens=1, completion_tokens=0)
    lie = {
        "kind": '{"type": "ranked", "id": "ID", "score": 1, "usage": {"prompt_tokens": 1, "completion_tokens": 0}}',
        "stream": '{"type": "deltas", "items": [{"id": "ID", "tokens": [1], "text": "x"}]}',
        "nobody": encode(Embedded(id="nobody", vector=(1.0,), usage=usage)).decode().strip(),
    }[wrong].replace("ID", question.id)
    states = [Status(state="Idle"), Status(state="Loading"), Status(state="Loaded")]
    start = b"".join(map(encode, [*states, Status(state="Ready", capabilities=capabilities)])).decode()
    source = f"import sys\nprint({start!r}, end='', flush=True)\nsys.stdin.readline()\nsys.stdin.readline()\n"
    source += f"print({lie!r}, flush=True)\nsys.stdin.read()"
    async with ready(tmp_path, (sys.executable, "-c", source)) as process:
        error = await refused(process, question)
        assert error.failed.code == "runner_died"
        assert "request" in error.failed.message
