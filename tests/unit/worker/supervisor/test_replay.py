from exo.worker.protocol.events import Capabilities, Delta, Failed, Logprob, PromptLogprobs, TokenLogprobs
from exo.worker.supervisor.replay import FRUITLESS_REPLAYS, UNLUCKY_REPLAYS, Replay, ReplayBudget, other_model, spent
from tests.support.program import ask


def replays(budget: ReplayBudget, runner: str = "cuda", *, produced_output: bool = False) -> int:
    """How many more deaths of a runner a request survives."""
    return next(number for number in range(1000) if not budget.allows_replay(runner, produced_output=produced_output))


def test_a_request_that_never_gets_a_token_is_given_up() -> None:
    assert replays(ReplayBudget()) == FRUITLESS_REPLAYS


def test_a_request_whose_neighbours_get_on_is_given_up_later() -> None:
    assert replays(ReplayBudget(), produced_output=True) == UNLUCKY_REPLAYS > FRUITLESS_REPLAYS


def test_only_fruitless_starts_in_a_row_count() -> None:
    budget = ReplayBudget()
    for _ in range(UNLUCKY_REPLAYS):
        for _ in range(FRUITLESS_REPLAYS):
            assert budget.allows_replay("cuda", produced_output=False)
        assert budget.allows_replay("cuda", produced_output=True)
    assert not budget.allows_replay("cuda", produced_output=True)


def test_a_token_and_another_engine_give_the_whole_budget_back() -> None:
    budget = ReplayBudget()
    replays(budget)
    assert not budget.untouched
    budget.progressed()
    assert budget.untouched
    assert replays(budget) == FRUITLESS_REPLAYS
    assert replays(budget, "mlx") == FRUITLESS_REPLAYS


def test_the_remainder_has_every_token_taken() -> None:
    replay = Replay(ask("one"))
    assert replay.remainder() == ask("one")
    replay.take(Delta(id="one", tokens=(1, 2), text="ab"))
    replay.take(Delta(id="one", tokens=(3,), text=""))
    assert replay.remainder() == ask("one").model_copy(update={"delivered": (1, 2, 3)})


def test_the_prompt_s_logprobs_are_told_once_whichever_runner_tells_them() -> None:
    request = ask("one").model_copy(update={"prompt_logprobs": 2, "logprobs": 1})
    replay = Replay(request)
    items = tuple(TokenLogprobs(chosen=Logprob(token=at, bytes=(), logprob=-1.0)) for at in range(10))

    def told(start: int, stop: int) -> tuple[int, tuple[TokenLogprobs, ...]]:
        untold = replay.undelivered(PromptLogprobs(id="one", start=start, items=items[start:stop]))
        return untold.start, untold.items

    assert told(0, 3) == (0, items[:3])
    assert told(3, 5) == (3, items[3:5])
    assert replay.budget.untouched
    assert replay.remainder() == request
    assert told(0, 4)[1] == ()
    assert told(4, 8) == (5, items[5:8])
    assert told(8, 10) == (8, items[8:])
    replay.take(Delta(id="one", tokens=(1,), text="a"))
    assert replay.remainder() == request.model_copy(update={"prompt_logprobs": None, "delivered": (1,)})


def test_what_makes_another_model() -> None:
    one = Capabilities(
        engine="a", engine_version="1", backend="b", context_length=8, slots=1, vocabulary=9, chat_template="t\n"
    )
    assert other_model(one, one) is None
    assert other_model(one, one.model_copy(update={"engine": "c", "model_bytes": 5, "chat_template": "t"})) is None
    for change in (
        {"vocabulary": 10},
        {"chat_template": "u"},
        {"chat_template": None},
        {"model_bytes": 5},
        {"special_ids": (1,)},
        {"eos_token": "</s>"},
    ):
        assert other_model(one, one.model_copy(update=change)) is not None


def test_the_failure_of_a_request_whose_budget_is_spent_keeps_its_code_and_tells_the_last_cause() -> None:
    failed = spent(Failed(id="one", code="out_of_memory", message="no room"))
    assert (failed.id, failed.code) == ("one", "out_of_memory")
    assert "restarted repeatedly" in failed.message
    assert "no room" in failed.message
