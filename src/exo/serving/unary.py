"""Requests with one answer: a runner executes some commands at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

from exo.serving.activity import current_record
from exo.serving.errors import ServingError, from_failed
from exo.serving.failover import Failover, LoadedRunner
from exo.serving.request import RequestedModel
from exo.worker.protocol.commands import Embed, Rank, Tokenize
from exo.worker.protocol.events import Embedded, Ranked, Tokenized, Usage
from exo.worker.protocol.runners import Need
from exo.worker.supervisor.replay import ReplayBudget
from exo.worker.supervisor.runner_error import RunnerError

if TYPE_CHECKING:
    from exo.serving.app_state import Services

Command = Embed | Rank | Tokenize
Answer = Embedded | Ranked | Tokenized


@dataclass(frozen=True, slots=True)
class Answered:
    """The answers in the order of the commands, and the runner that was found last."""

    runner: LoadedRunner
    answers: list[Answer]


async def ask(
    services: "Services",
    model: RequestedModel,
    commands: Sequence[Command] = (),
    *,
    needs: Mapping[Need, str] | None = None,
    params: Mapping[str, str] = {},
    keep_seconds: float | None = None,
) -> Answered:
    """Has a runner execute all commands at once. The first failure ends the others. Raises ``ServingError``.

    ``needs`` is as in ``Routing.choose``. ``params`` maps the protocol's fields to the client's where their names
    differ. ``keep_seconds`` is how long the model stays loaded afterwards without being used; None changes nothing.
    """

    def failed(error: RunnerError, member: int | None = None) -> ServingError:
        return from_failed(error.failed, params=params, retry_seconds=error.retry_seconds, member=member)

    record = current_record()
    record.model = model.card.model_id
    with (
        services.queues.place(model.card.model_id, len(commands)),
        Failover(services, model, needs, keep_seconds) as failover,
    ):
        record.begin(model.card.model_id, len(commands))
        try:
            await failover.acquire(ReplayBudget())
            services.queues.slots_changed(model.card.model_id)
            if commands:
                record.enter("prefill")
            answers = await _execute(failover, commands, failed)
            record.use(_total_usage(answers))
            return Answered(failover.runner, answers)
        except RunnerError as error:
            raise failed(error) from None


def _total_usage(answers: Sequence[Answer]) -> Usage:
    """Tokenizing computes nothing."""
    usages = [answer.usage for answer in answers if not isinstance(answer, Tokenized)]
    return Usage(
        prompt_tokens=sum(each.prompt_tokens for each in usages),
        completion_tokens=0,
        cached_tokens=sum(each.cached_tokens for each in usages),
    )


async def _execute(
    failover: Failover, commands: Sequence[Command], failed: Callable[[RunnerError, int | None], ServingError]
) -> list[Answer]:
    answers: dict[int, Answer] = {}
    failures: list[ServingError] = []

    async def execute(at: int, command: Command) -> None:
        try:
            answers[at] = await failover.ask(command)
        except RunnerError as error:
            failures.append(failed(error, at if len(commands) > 1 else None))
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
