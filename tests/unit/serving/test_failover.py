"""Whether a request that has failed on one runner is replayed on another. No runner is started."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from exo.cards.catalogue import Catalogue
from exo.config import Settings
from exo.serving.app_state import Services
from exo.serving.failover import Failover, LoadedRunner
from exo.serving.request import RequestedModel
from exo.worker.protocol.commands import Load
from exo.worker.protocol.events import Capabilities, ErrorCode, Failed
from exo.worker.router import Route
from exo.worker.supervisor.replay import DEATHS, FRUITLESS_REPLAYS, UNLUCKY_REPLAYS, ReplayBudget
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.runner_process import RunnerProcess
from tests.conftest import fake_card

CAPABILITIES = Capabilities(engine="x", engine_version="1", backend="x", context_length=9, slots=1, vocabulary=9)
DIED = Failed(code="runner_died", message="it was killed")
MINE = DIED.model_copy(update={"id": "mine"})


@dataclass(frozen=True, slots=True)
class Request:
    failover: Failover
    runner: LoadedRunner

    @property
    def process(self) -> RunnerProcess:
        return self.runner.process

    def replays(self, failed: Failed = MINE, most: int = 100) -> int:
        """How often the request is replayed until this failure ends it, at most ``most`` times."""
        budget = ReplayBudget()
        for number in range(most):
            try:
                self.failover.check_replay(self.runner, failed, budget)
            except RunnerError:
                return number
        return most


@pytest.fixture
async def asked(tmp_path: Path) -> Request:
    """Asynchronous, as a process belongs to an event loop."""
    card = fake_card()
    settings = Settings(
        host="127.0.0.1",
        port=0,
        models_directory=tmp_path,
        models_directories=(tmp_path,),
        cards_directory=tmp_path,
        log_directory=tmp_path,
    )
    services = Services(settings, Catalogue({card.model_id: card}, {}, ()), {})
    process = RunnerProcess(["x"], Load(model_id=card.model_id, backend="x", table={}), tmp_path / "log")
    route = Route(runner="cuda", instance=None, backend="x", reason="the test")
    return Request(
        Failover(services, RequestedModel(card, None), None), LoadedRunner(route, card, process, CAPABILITIES)
    )


async def test_a_request_is_replayed_while_its_budget_lasts(asked: Request) -> None:
    asked.process.failure = DIED
    assert asked.replays() == FRUITLESS_REPLAYS
    asked.process.produced_output.set()
    assert asked.replays() == UNLUCKY_REPLAYS


async def test_a_request_that_is_given_up_is_told_why_and_when_to_try_again(asked: Request) -> None:
    asked.process.failure = DIED
    budget = ReplayBudget()
    for _ in range(FRUITLESS_REPLAYS):
        asked.failover.check_replay(asked.runner, MINE, budget)
    with pytest.raises(RunnerError, match=r"restarted repeatedly .* it was killed") as caught:
        asked.failover.check_replay(asked.runner, MINE, budget)
    assert (caught.value.failed.id, caught.value.failed.code) == ("mine", "runner_died")
    assert caught.value.retry_seconds is not None


@pytest.mark.parametrize("code", ["invalid_request", "context_length_exceeded", "shutdown"])
async def test_what_the_request_itself_causes_is_not_tried_again(asked: Request, code: ErrorCode) -> None:
    assert code not in DEATHS
    asked.process.failure = Failed(code=code, message="the request's")
    failed = Failed(id="mine", code=code, message="the request's")
    with pytest.raises(RunnerError) as caught:
        asked.failover.check_replay(asked.runner, failed, ReplayBudget())
    assert caught.value.failed == failed
    assert caught.value.retry_seconds is None


async def test_an_error_of_one_request_on_a_runner_that_lives_is_not_tried_again(asked: Request) -> None:
    failed = Failed(id="mine", code="engine_error", message="NaN")
    assert asked.replays(failed) == 0
    asked.process.failure = DIED
    assert asked.replays(failed) == 0


async def test_a_request_whose_runner_makes_room_for_another_model_loses_none_of_its_replays(
    asked: Request,
) -> None:
    asked.process.failure = asked.process.displaced = DIED
    assert asked.replays() == 100
