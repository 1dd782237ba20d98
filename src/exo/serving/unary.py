"""Requests with one answer: a runner executes some commands at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import anyio

from exo.serving.app_state import Services
from exo.serving.errors import ServingError, from_failed
from exo.serving.failover import Attempts, LoadedRunner
from exo.worker.protocol.messages import Embed, Embedded, Rank, Ranked, Tokenize, Tokenized
from exo.worker.protocol.runners import Need
from exo.worker.router import Route, parse_model
from exo.worker.supervisor.replay import ReplayBudget
from exo.worker.supervisor.runner_process import RunnerError

Command = Embed | Rank | Tokenize
Answer = Embedded | Ranked | Tokenized


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Commands for one model. ``params`` are the client's names for the contract's fields, where they differ."""

    model: str
    needs: Mapping[Need, str] | None
    """As ``Services.choose`` takes them."""
    commands: Sequence[Command]
    params: Mapping[str, str]
    keep_seconds: float | None = None
    """How long the model then stays loaded without being used; None changes nothing."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The answers in the order of the commands, by whom, and the headers that tell so."""

    runner: LoadedRunner
    answers: list[Answer]
    headers: Mapping[str, str]


async def ask(services: Services, question: Question) -> Answered:
    """Has a runner execute all commands at once. Raises ``ServingError``; the first failure ends the others."""
    headers: dict[str, str] = {}

    def on_route(route: Route) -> None:
        headers.update({"x-exo-runner": route.runner, "x-exo-route": route.reason})

    async def on_loading(_: str) -> None:
        """Nothing to tell yet."""

    model = services.named(question.model)
    model_id = services.card(parse_model(model).name).model_id
    attempts = Attempts(services, model, question.needs, on_route, on_loading, question.keep_seconds)
    with services.queues.place(model_id, len(question.commands)), attempts:
        try:
            runner = await attempts.runner(ReplayBudget())
            services.queues.slots_changed(model_id)
            return Answered(runner, await _all(attempts, runner, question.commands), headers)
        except RunnerError as error:
            raise from_failed(error.failed, params=question.params, retry_seconds=error.retry_seconds) from None


async def _all(attempts: Attempts, runner: LoadedRunner, commands: Sequence[Command]) -> list[Answer]:
    answers: dict[int, Answer] = {}
    failures: list[RunnerError | ServingError] = []

    async def one(at: int, command: Command) -> None:
        try:
            answers[at] = await attempts.ask(runner, command)
        except (RunnerError, ServingError) as error:
            failures.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for at, command in enumerate(commands):
            tasks.start_soon(one, at, command)
    if failures:
        raise failures[0]
    return [answers[at] for at in range(len(commands))]
