import signal
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import psutil
import pytest

from exo.cards.card import ModelCard
from exo.worker.protocol.commands import Load
from exo.worker.protocol.events import Failed, Status
from exo.worker.protocol.runners import runner_commands
from exo.worker.protocol.wire import encode
from exo.worker.router import LiveRunner, Route
from exo.worker.supervisor.circuit_breaker import FAILURES_TO_AVOID
from exo.worker.supervisor.pool import RunnerPool
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.runner_process import RunnerProcess
from tests.conftest import fake_card
from tests.support.fake_runner import COMMAND
from tests.support.program import DEADLINE_SECONDS, ask
from tests.support.runner_pool import ANEW, finishes, loading, pass_gate


@asynccontextmanager
async def opened(
    directory: Path, command: Sequence[str] = COMMAND, models_directories: Sequence[Path] = ()
) -> AsyncGenerator[RunnerPool]:
    with anyio.fail_after(DEADLINE_SECONDS):
        async with RunnerPool(models_directories, directory / "logs", {"cuda": command, "other": command}) as instances:
            yield instances
    assert psutil.Process().children(recursive=True) == []


def instance_of(instances: RunnerPool, model_id: str) -> LiveRunner:
    (found,) = [each for each in instances.live() if each.model_id == model_id]
    return found


async def test_a_hundred_requests_at_once_start_one_load(tmp_path: Path) -> None:
    card = fake_card()
    processes: list[RunnerProcess] = []

    async def request(number: int) -> None:
        await anyio.lowlevel.checkpoint()
        process = instances.acquire(ANEW, card)
        processes.append(process)
        await process.ready()
        assert len(psutil.Process().children()) == 1
        assert await finishes(process, f"request {number}")

    async with opened(tmp_path) as instances:
        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(request, number)
        assert len(processes) == 100
        assert len(set(processes)) == 1
        assert len(instances.live()) == 1


async def test_a_load_goes_on_when_the_request_that_caused_it_is_gone(tmp_path: Path, gate: Path) -> None:
    card = fake_card(load_gate=str(gate))
    async with opened(tmp_path) as instances:
        with anyio.CancelScope() as client:
            await loading(instances.acquire(ANEW, card))
            client.cancel()
            await instances.acquire(ANEW, card).ready()
        assert client.cancelled_caught
        process = instances.acquire(ANEW, card)
        assert process.status.state == "Loading"
        await pass_gate(gate)
        await process.ready()
        assert await finishes(process)


async def test_a_failed_load_is_told_to_all_who_wait_and_may_be_tried_again(tmp_path: Path, gate: Path) -> None:
    card = fake_card(load_gate=str(gate), fail_load="the file is truncated")
    failures: list[Failed] = []

    async def request() -> None:
        with pytest.raises(RunnerError) as caught:
            await instances.acquire(ANEW, card).ready()
        failures.append(caught.value.failed)

    async with opened(tmp_path) as instances:
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(request)
            await loading(instances.acquire(ANEW, card))
            await pass_gate(gate)
        assert failures == [Failed(code="model_load_failed", message="the file is truncated")] * 10
        assert instances.live() == ()
        again = instances.acquire(ANEW, fake_card())
        await again.ready()
        assert await finishes(again)


async def test_a_dead_runner_is_replaced(tmp_path: Path) -> None:
    async with opened(tmp_path) as instances:
        first = instances.acquire(ANEW, fake_card())
        await first.ready()
        (child,) = psutil.Process().children()
        child.send_signal(signal.SIGKILL)
        await first.ended()
        assert instances.live() == ()
        second = instances.acquire(ANEW, fake_card())
        assert second is not first
        await second.ready()
        assert await finishes(second)


async def fail(instances: RunnerPool, card: ModelCard) -> None:
    """Starts a runner that fails to load. Raises ``RunnerError`` if it may not be started."""
    process = instances.acquire(ANEW, card)
    with pytest.raises(RunnerError, match="no such file"):
        await process.ready()


async def test_a_runner_that_fails_in_a_row_is_not_started_for_a_while_and_others_are(tmp_path: Path) -> None:
    broken = fake_card("org/broken", fail_load="no such file")
    async with opened(tmp_path) as instances:
        for _ in range(2):
            await fail(instances, broken)
        with pytest.raises(RunnerError) as caught:
            instances.acquire(ANEW, broken)
        assert caught.value.retry_seconds is not None
        assert caught.value.retry_seconds > 0
        assert "failed 2 times in a row with org/broken" in str(caught.value)
        assert "no such file" in str(caught.value)
        well = instances.acquire(ANEW, fake_card())
        await well.ready()
        assert await finishes(well)
        other = Route(runner="other", instance=None, backend="LlamaCppCpu", reason="the tests")
        await instances.acquire(other, fake_card("org/broken")).ready()
        assert instances.history.avoided(broken).keys() == {"cuda"}
        corrected = fake_card("org/broken", slots=2)
        assert not instances.history.avoided(corrected)
        at_once = instances.acquire(ANEW, corrected)
        await at_once.ready()
        assert await finishes(at_once)


async def test_a_runner_that_cannot_load_is_to_be_avoided_until_it_works(tmp_path: Path) -> None:
    async with opened(tmp_path) as instances:
        template = tmp_path / "template"
        card = fake_card(template_file=str(template))
        await fail(instances, card)
        assert instances.history.avoided(card).keys() == {"cuda"}
        template.touch()
        well = instances.acquire(ANEW, card)
        await well.ready()
        assert instances.history.avoided(card).keys() == {"cuda"}
        assert await finishes(well)
        await anyio.lowlevel.checkpoint()  # all events may come at once, and wake this test before the pool
        assert not instances.history.avoided(card)
        assert not instances.history.avoided(fake_card("fake/other"))


async def test_a_runner_that_dies_is_to_be_avoided_when_it_does_so_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exo.worker.supervisor.circuit_breaker.FIRST_PAUSE_SECONDS", 0)
    async with opened(tmp_path, (sys.executable, "-c", "raise SystemExit(3)")) as instances:
        for _ in range(FAILURES_TO_AVOID):
            assert not instances.history.avoided(fake_card())
            failed = await instances.acquire(ANEW, fake_card()).ended()
            assert failed.message == "the runner exited with code 3"
        assert instances.history.avoided(fake_card()).keys() == {"cuda"}


async def test_reports_show_the_living_and_those_that_failed_last(tmp_path: Path) -> None:
    async with opened(tmp_path) as instances:
        assert instances.reports() == ()
        broken = fake_card("org/broken", fail_load="no such file")
        await fail(instances, broken)
        await fail(instances, broken)
        (failed,) = instances.reports()
        assert failed.pause > 0
        well = instances.acquire(ANEW, fake_card())
        await well.ready()
        living, failed = instances.reports()
        (child,) = psutil.Process().children()
        assert (living.now.model_id, living.now.state, living.pid) == ("fake/model", "Ready", child.pid)
        assert (living.deaths, living.last_failure, living.pause) == (0, None, 0)
        assert (failed.now.model_id, failed.now.state, failed.pid) == ("org/broken", "Failed", None)
        assert (failed.deaths, failed.last_failure) == (2, Failed(code="model_load_failed", message="no such file"))
        assert living.started >= failed.started
        assert failed.failed >= failed.started
        await well.close()
        assert [each.now.model_id for each in instances.reports()] == ["org/broken"]


async def test_a_successor_starts_when_the_memory_of_the_failed_runner_is_free(tmp_path: Path) -> None:
    says = b"".join(map(encode, (Status(state="Idle"), Failed(code="out_of_memory", message="no room"))))
    linger = f"import sys\nsys.stdout.buffer.write({says!r})\nsys.stdout.flush()\nsys.stdin.read()"
    async with opened(tmp_path, (sys.executable, "-c", linger)) as instances:
        first = instances.acquire(ANEW, fake_card())
        while first.status.state != "Failed":
            await first.status_after(first.status)
        (child,) = psutil.Process().children()
        assert instances.live() == ()
        second = instances.acquire(ANEW, fake_card())
        assert second is not first
        while second.status.state != "Failed":
            assert psutil.Process().children() in ([], [child]) or first.failure is not None
            await second.status_after(second.status)
        assert first.failure == Failed(code="out_of_memory", message="no room")
        assert not child.is_running()


async def test_each_model_and_each_runner_has_its_own_process(tmp_path: Path) -> None:
    one, two = fake_card("org/one"), fake_card("org/two")
    other = Route(runner="other", instance=None, backend="LlamaCppCpu", reason="the tests")
    async with opened(tmp_path) as instances:
        processes = [instances.acquire(ANEW, one), instances.acquire(ANEW, two), instances.acquire(other, one)]
        for process in processes:
            await process.ready()
        assert len(set(processes)) == 3
        assert instances.acquire(ANEW, one) is processes[0]
        live = instances.live()
        assert [(each.runner, each.model_id) for each in live] == [
            ("cuda", "org/one"),
            ("cuda", "org/two"),
            ("other", "org/one"),
        ]
        assert len({each.instance for each in live}) == 3


async def test_a_route_to_a_live_instance_finds_it_and_one_to_a_dead_instance_starts_another(tmp_path: Path) -> None:
    card = fake_card()
    async with opened(tmp_path) as instances:
        first = instances.acquire(ANEW, card)
        await first.ready()
        route = Route("cuda", instance_of(instances, card.model_id).instance, "LlamaCppCpu", "the tests")
        assert instances.acquire(route, card) is first
        await first.close()
        second = instances.acquire(route, card)
        await second.ready()
        assert second is not first


async def test_live_runners_say_how_busy_they_are(tmp_path: Path, gate: Path) -> None:
    card = fake_card(load_gate=str(gate), slots=2, n_ctx=1 << 30)
    async with opened(tmp_path) as instances:
        process = instances.acquire(ANEW, card)
        await loading(process)
        loads = instance_of(instances, card.model_id)
        assert (loads.runner, loads.state, loads.slots, loads.capabilities) == ("cuda", "Loading", 0, None)
        await pass_gate(gate)
        capabilities = await process.ready()
        idle = instance_of(instances, card.model_id)
        assert (idle.state, idle.slots, idle.active, idle.waiting) == ("Ready", 2, 0, 0)
        assert idle.capabilities == capabilities
        async with (
            process.generate(ask("1", max_tokens=None)) as events,
            process.generate(ask("2", max_tokens=None)),
            process.generate(ask("3", max_tokens=None)),
        ):
            await anext(events)
            busy = instance_of(instances, card.model_id)
        assert (busy.instance, busy.state, busy.active, busy.waiting) == (idle.instance, "Running", 2, 1)


async def test_a_runner_is_told_what_to_load_and_where_to_look(tmp_path: Path) -> None:
    echo = f"import sys\nprint({encode(Status(state='Idle')).decode()!r}, end='', flush=True)\nsys.exit(input())"
    async with opened(tmp_path, (sys.executable, "-c", echo), [tmp_path / "a", tmp_path / "b"]) as instances:
        process = instances.acquire(ANEW, fake_card("org/model", file="x.gguf", slots=3))
        instance = instance_of(instances, "org/model").instance
        await process.ended()
    log = await anyio.Path(tmp_path / "logs" / f"{instance}.log").read_text()
    assert Load.model_validate_json(log) == Load(
        model_id="org/model",
        backend="LlamaCppCpu",
        table={"file": "x.gguf", "slots": 3},
        directories=(str(tmp_path / "a"), str(tmp_path / "b")),
        tasks=("TextGeneration",),
    )


async def test_close_ends_all_runners_and_starts_no_more(tmp_path: Path, gate: Path) -> None:
    async with opened(tmp_path) as instances:
        serving = [instances.acquire(ANEW, fake_card(name)) for name in ("a", "b")]
        for process in serving:
            await process.ready()
        starts = instances.acquire(ANEW, fake_card("c", load_gate=str(gate)))
        await loading(starts)
        just_begun = instances.acquire(ANEW, fake_card("d"))
        await instances.close()
        assert psutil.Process().children() == []
        assert instances.live() == ()
        for process in (*serving, starts, just_begun):
            assert process.failure == Failed(code="shutdown", message="the runner was shut down")
        with pytest.raises(RunnerError, match="the server is shutting down"):
            instances.acquire(ANEW, fake_card())


async def test_no_runner_outlives_a_cancelled_server(tmp_path: Path) -> None:
    with anyio.CancelScope() as server:
        async with opened(tmp_path) as instances:
            await instances.acquire(ANEW, fake_card()).ready()
            server.cancel()
            await anyio.sleep_forever()
    assert server.cancelled_caught
    assert psutil.Process().children() == []


def test_runners_are_started_as_modules() -> None:
    assert runner_commands()["cuda"] == (sys.executable, "-X", "utf8", "-m", "exo.worker.runner_cuda")
