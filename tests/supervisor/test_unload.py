"""Several models on one machine: who has to go, who waits, and that no request is lost over it."""

import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path

import anyio
import psutil
import pytest
from anyio.abc import TaskGroup
from pydantic import JsonValue

from exo.api.admin.runners import Instance
from exo.cards.card import ModelCard
from exo.worker.protocol.events import Finished
from exo.worker.supervisor.instance import InstanceReport
from exo.worker.supervisor.memory.memory import Memory
from exo.worker.supervisor.pool import RunnerPool
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.runner_process import RunnerProcess
from tests.conftest import fake_card
from tests.support.fake_runner import COMMAND, PROCESS_BYTES
from tests.support.program import DEADLINE_SECONDS, ask
from tests.support.runner_pool import ANEW, loading, pass_gate, until

GIB = 1 << 30


def large(model_id: str, memory: int = GIB, **fields: JsonValue) -> ModelCard:
    """A model that takes a GiB or so when it works."""
    table = {key: fields.pop(key) for key in list(fields) if key not in ModelCard.model_fields}
    return fake_card(model_id, memory=memory, **table).model_copy(update=fields)


@asynccontextmanager
async def machine(directory: Path, gigabytes: float = 1.5, **devices: int) -> AsyncGenerator[RunnerPool]:
    """With room for one of the models, unless said otherwise, and with devices of so many bytes."""
    with anyio.fail_after(DEADLINE_SECONDS):
        async with RunnerPool((), directory / "logs", {"cuda": COMMAND}) as instances:
            instances.set_capacity(Memory(int(gigabytes * GIB), devices))
            yield instances
    assert psutil.Process().children(recursive=True) == []


async def request(instances: RunnerPool, card: ModelCard, name: str, tokens: int = 3) -> RunnerProcess:
    """As the server has it: the runner is in use from the moment on that it is given."""
    process = instances.acquire(ANEW, card)
    with instances.using(process):
        await process.ready()
        async with process.generate(ask(name, max_tokens=tokens)) as events:
            assert isinstance([event async for event in events][-1], Finished)
    return process


def loaded(instances: RunnerPool) -> list[str]:
    return [each.model_id for each in instances.live() if each.state in ("Ready", "Running")]


def report(instances: RunnerPool, model_id: str) -> InstanceReport:
    (found,) = [each for each in instances.reports() if each.now.model_id == model_id]
    return found


async def test_the_least_recently_used_model_makes_room(tmp_path: Path) -> None:
    one, two, three = (large(name) for name in ("one", "two", "three"))
    async with machine(tmp_path, 2.6) as instances:
        await request(instances, one, "1")
        gone = await request(instances, two, "2")
        await request(instances, one, "3")
        await request(instances, three, "4")
        assert loaded(instances) == ["one", "three"]
        assert (await gone.ended()).code == "shutdown"


async def test_a_busy_model_answers_to_the_end_before_it_makes_room(tmp_path: Path) -> None:
    async with machine(tmp_path) as instances:
        busy = instances.acquire(ANEW, large("busy", step_seconds=0.01))
        async with anyio.create_task_group() as tasks:
            await makes_room_when_done(instances, busy, tasks)
        assert (await busy.ended()).code == "shutdown"
        assert loaded(instances) == ["new"]


async def makes_room_when_done(instances: RunnerPool, busy: RunnerProcess, tasks: TaskGroup) -> None:
    with instances.using(busy):
        await busy.ready()
        async with busy.generate(ask("long", max_tokens=30)) as events:
            await anext(events)
            tasks.start_soon(request, instances, large("new"), "next")
            await until(lambda: not loaded(instances))  # it takes no more requests
            assert busy.failure is None
            answer = [event async for event in events]
    assert isinstance(answer[-1], Finished)
    assert answer[-1].usage.completion_tokens == 30


async def test_a_pinned_model_stays_and_the_other_is_refused_with_both_numbers_and_a_way_out(tmp_path: Path) -> None:
    async with machine(tmp_path) as instances:
        pinned = await request(instances, large("pinned", pinned=True), "1")
        process = instances.acquire(ANEW, large("new", memory_per_token=1 << 16))
        with pytest.raises(RunnerError) as caught:
            await process.ready()
        assert caught.value.failed.code == "out_of_memory"
        needed = PROCESS_BYTES + GIB + 4096 * (1 << 16)
        assert f"new needs {needed:,} bytes of memory, and at most " in caught.value.failed.message
        assert caught.value.retry_seconds is None
        assert pinned.failure is None
        await until(lambda: [each.now.model_id for each in instances.reports()] == ["pinned"])
        await request(instances, large("small", memory=1 << 20), "2")
        again = instances.acquire(ANEW, large("new"))
        with pytest.raises(RunnerError, match="new needs"):
            await again.ready()


async def test_a_refusal_names_the_context_that_would_fit(tmp_path: Path) -> None:
    async with machine(tmp_path, 1) as instances:
        process = instances.acquire(ANEW, large("new", 1 << 20, memory_per_token=1 << 19))
        with pytest.raises(RunnerError, match=r"with n_ctx = 1024 in \[cuda\] of its model card it would fit"):
            await process.ready()
        await request(instances, large("new", 1 << 20, memory_per_token=1 << 19, n_ctx=1024), "1")


async def test_an_open_context_is_what_there_is_memory_for(tmp_path: Path) -> None:
    card = large("open", 1 << 20, memory_per_token=1 << 19, n_ctx="auto")
    async with machine(tmp_path, 1.2) as instances:
        process = await request(instances, card, "1")
        assert process.capabilities is not None
        assert process.capabilities.context_length == 2048


async def test_what_is_measured_replaces_the_estimate(tmp_path: Path) -> None:
    async with machine(tmp_path) as instances:
        await request(instances, large("one"), "1")
        assert report(instances, "one").tokens_per_second > 0
        await until(lambda: report(instances, "one").measured is not None)
        shown = report(instances, "one")
        assert shown.pid is not None
        assert shown.measured is not None
        has = psutil.Process(shown.pid).memory_info().rss
        assert shown.measured.host == pytest.approx(has, rel=0.1)
        assert shown.reserved.host == shown.measured.host + GIB


async def test_hundred_waiting_requests_start_one_load_and_a_slow_one_holds_up_nobody_else(
    tmp_path: Path, gate: Path
) -> None:
    slow, quick = large("slow", load_gate=str(gate)), large("quick")
    used: set[RunnerProcess] = set()

    async def ask_for(card: ModelCard, name: str) -> None:
        used.add(await request(instances, card, name))

    async with machine(tmp_path, 8) as instances:
        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(ask_for, slow, f"slow {number}")
            await loading(instances.acquire(ANEW, slow))
            for number in range(100):
                await ask_for(quick, f"quick {number}")
            assert len(used) == 1
            await pass_gate(gate)
        assert len(used) == 2


async def test_alternating_requests_for_two_models_that_do_not_fit_together_lose_none(tmp_path: Path) -> None:
    cards = [large("one"), large("two")]
    answered: list[str] = []

    async def client(card: ModelCard, number: int) -> None:
        await request(instances, card, f"{card.model_id} {number}")
        assert len(loaded(instances)) <= 1
        answered.append(card.model_id)

    async with machine(tmp_path) as instances:
        for number in range(4):
            await client(cards[number % 2], number)
        async with anyio.create_task_group() as tasks:
            for number in range(4, 24):
                tasks.start_soon(client, cards[number % 2], number)
                await anyio.sleep(0.01)
    assert sorted(answered) == ["one"] * 12 + ["two"] * 12


async def test_a_model_is_unloaded_after_its_time(tmp_path: Path) -> None:
    async with machine(tmp_path) as instances:
        kept = await request(instances, large("kept", 0), "1")
        brief = await request(instances, large("brief", 0, ttl=0.05), "2")
        assert report(instances, "kept").time_left is None
        assert (await brief.ended()).code == "shutdown"
        assert loaded(instances) == ["kept"]
        instances.keep_alive("kept", 100)
        assert 0 < (report(instances, "kept").time_left or 0) <= 100
        instances.keep_alive("kept", 0)
        assert (await kept.ended()).code == "shutdown"


async def test_what_a_request_asks_for_holds_from_its_end_and_until_the_model_is_unloaded(tmp_path: Path) -> None:
    card = large("one", 0, ttl=1000)
    async with machine(tmp_path) as instances:
        first = instances.acquire(ANEW, card)
        with instances.using(first):
            await first.ready()
            instances.keep_alive("one", 0)
            async with first.generate(ask("1", max_tokens=3)) as events:
                assert isinstance([event async for event in events][-1], Finished)
            assert first.failure is None
        await first.ended()
        await request(instances, card, "2")
        assert 900 < (report(instances, "one").time_left or 0) <= 1000


async def test_a_stop_lets_requests_end_and_new_ones_have_the_model_loaded_again(tmp_path: Path) -> None:
    card = large("one", 0, step_seconds=0.01)
    async with machine(tmp_path) as instances, anyio.create_task_group() as tasks:
        first = instances.acquire(ANEW, card)
        with instances.using(first):
            await first.ready()
            async with first.generate(ask("1", max_tokens=20)) as events:
                await anext(events)
                tasks.start_soon(instances.unload, "one", DEADLINE_SECONDS)
                await until(lambda: not loaded(instances))
                second = instances.acquire(ANEW, card)
                assert second is not first
                answer = [event async for event in events]
                assert isinstance(answer[-1], Finished)
        await second.ready()
        assert first.failure is not None
        assert await instances.unload("one", 0) == 1
        assert await instances.unload("one", 0) == 0


async def test_a_stop_cuts_off_what_takes_too_long(tmp_path: Path) -> None:
    async with machine(tmp_path) as instances:
        process = instances.acquire(ANEW, large("one", 0, step_seconds=0.01))
        with instances.using(process):
            await process.ready()
            async with process.generate(ask("1", max_tokens=None)) as events:
                await anext(events)
                assert await instances.unload("one", 0.05) == 1
                assert "shutdown" in str([event async for event in events][-1])


def on_card(model_id: str, name: str, size: int) -> ModelCard:
    return large(model_id, memory=0, on_devices={name: size})


async def test_models_on_two_cards_do_not_mind_each_other_and_who_is_on_the_full_one_makes_room(tmp_path: Path) -> None:
    first, second, other = on_card("first", "CUDA0", 60), on_card("second", "CUDA1", 50), on_card("other", "CUDA1", 40)
    async with machine(tmp_path, CUDA0=80, CUDA1=80) as instances:
        await request(instances, first, "1")
        await request(instances, second, "2")
        assert loaded(instances) == ["first", "second"]
        (row,) = Instance.of(report(instances, "second")).device_memory
        assert (row.device, row.reserved) == ("CUDA1", 50)
        await request(instances, other, "3")
        assert loaded(instances) == ["first", "other"]
        with pytest.raises(RunnerError) as caught:
            await instances.acquire(ANEW, on_card("large", "CUDA1", 90)).ready()
        assert caught.value.failed.code == "out_of_memory"
        assert "large needs 90 bytes of memory on CUDA1, and at most 80 can be freed" in caught.value.failed.message
        assert loaded(instances) == ["first", "other"]


async def test_random_lives_over_commit_nothing_leak_nothing_and_lose_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests, stops, kills and times over, on a machine with room for two of five models."""
    monkeypatch.setattr("exo.worker.supervisor.circuit_breaker.FIRST_PAUSE_SECONDS", 0)
    chance = random.Random(1)
    cards = [large(f"model-{at}", ttl=0.1 if at == 4 else None) for at in range(5)]
    unanswered: set[int] = set()

    async def client(instances: RunnerPool, card: ModelCard, number: int) -> None:
        """Asks again where its runner was killed or stopped under it, as the server does."""
        unanswered.add(number)
        for attempt in count():
            with suppress(RunnerError, AssertionError):
                await request(instances, card, f"{number}, attempt {attempt}")
                unanswered.remove(number)
                return

    async with machine(tmp_path, 2.6) as instances:
        async with anyio.create_task_group() as tasks:
            for step in range(300):
                card = chance.choice(cards)
                pids = [each.pid for each in instances.reports() if each.pid is not None]
                match chance.randrange(30):
                    case 0:
                        tasks.start_soon(instances.unload, card.model_id, 1.0)
                    case 1 if pids:
                        with suppress(psutil.NoSuchProcess):  # it may just have ended by itself
                            psutil.Process(chance.choice(pids)).kill()
                    case _:
                        tasks.start_soon(client, instances, card, step)
                assert sum(each.reserved.host for each in instances.reports()) <= 2.6 * GIB
                await anyio.sleep(0.005)
        assert unanswered == set()
        for card in cards:
            await instances.unload(card.model_id, 1.0)
        await until(lambda: all(each.pid is None for each in instances.reports()))
        assert sum(each.reserved.host for each in instances.reports()) == 0
