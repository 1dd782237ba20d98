"""Requests that are answered in one piece: a runner's answers to some commands, unless the client leaves before."""

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from exo.api.http.errors import INTERNAL_ERROR, ApiError, ErrorBody, from_failed
from exo.serving.app_state import Services
from exo.serving.failover import Attempts, Runner
from exo.worker.protocol.messages import Embed, Embedded, Rank, Ranked, Tokenize, Tokenized
from exo.worker.protocol.runners import Need
from exo.worker.router import Route, parse_model
from exo.worker.supervisor.replay import ReplayBudget
from exo.worker.supervisor.runner_process import RunnerError

log = logging.getLogger(__name__)

_PIECE = 16
"""Elements of a list, each up to some thousand numbers, that are encoded at once."""
_TURN_SECONDS = 0.002
T = TypeVar("T")

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

    runner: Runner
    answers: list[Answer]
    headers: Mapping[str, str]


async def ask(services: Services, question: Question) -> Answered:
    """Has a runner execute all commands at once. Raises ``ApiError``; the first failure ends the others."""
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


async def _all(attempts: Attempts, runner: Runner, commands: Sequence[Command]) -> list[Answer]:
    answers: dict[int, Answer] = {}
    failures: list[RunnerError | ApiError] = []

    async def one(at: int, command: Command) -> None:
        try:
            answers[at] = await attempts.ask(runner, command)
        except (RunnerError, ApiError) as error:
            failures.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for at, command in enumerate(commands):
            tasks.start_soon(one, at, command)
    if failures:
        raise failures[0]
    return [answers[at] for at in range(len(commands))]


class AnswerReply(Response):
    """Works out its body while the client waits, and stops when it leaves.

    ``work`` returns the body and headers for it, and raises ``ApiError``.
    """

    def __init__(self, work: Callable[[], Awaitable[tuple[BaseModel, Mapping[str, str]]]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Replies, as ASGI has it."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_when_client_leaves, receive, tasks)
            result = await self._run()
            reply = result.response(scope["path"]) if isinstance(result, ErrorBody) else result
            await reply(scope, receive, send)
            tasks.cancel_scope.cancel()

    async def _run(self) -> Response | ErrorBody:
        try:
            body, headers = await self._work()
        except ApiError as error:
            return error.body
        except Exception:
            log.exception("a request failed")
            return INTERNAL_ERROR
        return Response(await _encoded(body), headers=dict(headers), media_type="application/json")


async def _encoded(body: BaseModel) -> bytes:
    """The body as JSON. Long lists are encoded in pieces, so that a large reply does not hold up every stream."""
    values: dict[str, object] = dict(body)
    lists = {name: cast(list[object], value) for name, value in values.items() if isinstance(value, list)}
    lists = {name: value for name, value in lists.items() if len(value) > _PIECE}
    data = body.model_copy(update={name: list[object]() for name in lists}).model_dump_json().encode()
    for name, value in lists.items():
        pieces = [to_json(piece)[1:-1] async for piece in in_pieces(value)]
        empty, whole = f'"{name}":[]'.encode(), f'"{name}":['.encode() + b",".join(pieces) + b"]"
        data = data.replace(empty, whole, 1)
    return data


async def in_pieces(items: Sequence[T], size: int = _PIECE) -> AsyncGenerator[Sequence[T]]:
    """All of ``items``, with turns for others in between."""
    began = time.monotonic()
    for at in range(0, len(items), size):
        yield items[at : at + size]
        if time.monotonic() - began > _TURN_SECONDS:
            await anyio.lowlevel.checkpoint()
            began = time.monotonic()


async def cancel_when_client_leaves(receive: Receive, tasks: TaskGroup) -> None:
    """Ends ``tasks`` when nobody waits for the reply any more."""
    while (await receive())["type"] != "http.disconnect":
        pass
    tasks.cancel_scope.cancel()
