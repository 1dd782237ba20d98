"""Requests with one answer: a runner executes some commands at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import anyio

from exo.serving.app_state import Services
from exo.serving.errors import ServingError, from_failed
from exo.serving.failover import Failover, LoadedRunner
from exo.serving.routing import RequestedModel
from exo.worker.protocol.commands import Embed, Rank, Tokenize
from exo.worker.protocol.events import Embedded, Ranked, Tokenized
from exo.worker.protocol.runners import Need
from exo.worker.supervisor.replay import ReplayBudget
from exo.worker.supervisor.runner_process import RunnerError

Command = Embed | Rank | Tokenize
Answer = Embedded | Ranked | Tokenized


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Commands for one model. ``params`` maps the protocol's fields to the client's where their names differ."""

    model: RequestedModel
    needs: Mapping[Need, str] | None
    """See ``Routing.choose``."""
    commands: Sequence[Command]
    params: Mapping[str, str]
    keep_seconds: float | None = None
    """How long the model stays loaded afterwards without being used; None changes nothing."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The answers in the order of the commands, and the runner that was found last."""

    runner: LoadedRunner
    answers: list[Answer]


async def ask(services: Services, question: Question) -> Answered:
    """Has a runner execute all commands at once. The first failure ends the others. Raises ``ServingError``."""
    model_id = question.model.card.model_id
    with (
        services.queues.place(model_id, len(question.commands)),
        Failover(services, question.model, question.needs, question.keep_seconds) as failover,
    ):
        try:
            await failover.acquire(ReplayBudget())
            services.queues.slots_changed(model_id)
            answers = await _execute(failover, question)
            return Answered(failover.runner, answers)
        except RunnerError as error:
            raise _failed(question, error, None) from None


def _failed(question: Question, error: RunnerError, member: int | None) -> ServingError:
    return from_failed(error.failed, params=question.params, retry_seconds=error.retry_seconds, member=member)


async def _execute(failover: Failover, question: Question) -> list[Answer]:
    answers: dict[int, Answer] = {}
    failures: list[ServingError] = []
    commands = question.commands

    async def execute(at: int, command: Command) -> None:
        try:
            answers[at] = await failover.ask(command)
        except RunnerError as error:
            failures.append(_failed(question, error, at if len(commands) > 1 else None))
            tasks.cancel_scope.cancel()
        except ServingError as error:
            failures.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for at, command in enumerate(commands):
            tasks.start_soon(execute, at, command)
    if failures:
        raise failures[0]
    return [answers[at] for at in range(len(commands))]
