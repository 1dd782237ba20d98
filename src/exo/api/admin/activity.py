"""The last requests and their progress, in one reply and as server-sent events."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Self, final

import anyio
from fastapi import APIRouter, Query
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from exo.api.admin.runners import Instance, InstanceList
from exo.api.http import sse
from exo.api.http.unary_response import cancel_when_client_leaves
from exo.serving.activity import Dialect, Phase, ReplayNote, RequestRecord
from exo.serving.app_state import Services
from exo.worker.protocol.events import ErrorCode

_TICK_SECONDS = 0.25
"""Time between two looks at the progress of requests and at the runners."""
_PAUSE_SECONDS = 0.05
"""The least time between two writes: what has changed meanwhile is told at once."""


class RequestActivity(BaseModel):
    """The facts of one request. Times are in seconds."""

    id: str
    """The ``x-request-id`` of the reply. A client may give several requests the same one."""
    client: str
    """The first word of its user agent, and its address."""
    dialect: Dialect
    path: str
    model: str
    """The model id; empty if no model card has the name that was asked for."""
    runner: str
    host: str = ""
    """The other host where it runs; empty for this machine."""
    instance: str
    """The runner process; empty until the request has one."""
    route: str
    """Why this runner was chosen."""
    phase: Phase
    status: int | None
    """The HTTP status; null until the reply begins."""
    error: str | None
    """The code of the error that ended it."""
    started: float
    """Seconds since 1970."""
    queue_s: float
    """The time for which it waited for a slot, or for its prompt to be made."""
    load_s: float
    """The time for which it waited for its model."""
    first_token_s: float | None
    """The time from its arrival to its first token."""
    seconds: float
    """The time from its arrival until now or until its end."""
    prompt_tokens: int
    """0 until the runner has counted them."""
    cached_tokens: int
    """Prompt tokens that were not computed again; 0 until the end."""
    prefill_done: int
    """Prompt tokens that are computed or were cached."""
    completion_tokens: int
    tokens_per_second: float | None
    """The rate after the first token."""
    finish_reason: str | None
    replays: int
    """How often its runner died and it continued."""

    @classmethod
    def of(cls, record: RequestRecord) -> Self:
        """The form of the API."""
        route, first = record.route, record.first_token
        rate = record.tokens_per_second
        return cls(
            id=record.id,
            client=record.client,
            dialect=record.dialect,
            path=record.path,
            model=record.model,
            runner="" if route is None else route.runner,
            host="" if route is None else route.host,
            instance=record.instance,
            route="" if route is None else route.reason,
            phase=record.phase,
            status=record.status,
            error=record.error or None,
            started=round(record.started, 3),
            queue_s=round(record.seconds_in("queued"), 4),
            load_s=round(record.seconds_in("loading"), 4),
            first_token_s=None if first is None else round(first - record.began, 4),
            seconds=round(record.seconds, 4),
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            prefill_done=record.prefill_done,
            completion_tokens=record.completion_tokens,
            tokens_per_second=None if rate is None else round(rate, 2),
            finish_reason=record.finish_reason,
            replays=record.replays,
        )


class ActivityList(BaseModel):
    """The requests that run, and then the last ones that have ended, each time the newest first."""

    requests: list[RequestActivity]


class RunnerDeath(BaseModel):
    """The event ``death``: a runner process has failed. The fields are those of ``/v1/instances``."""

    model: str
    runner: str
    code: ErrorCode
    message: str
    deaths: int
    at: int
    """Seconds since 1970."""


class RequestReplay(BaseModel):
    """The event ``replay``: a request has lost its runner and continues."""

    request: str
    model: str
    instance: str
    """The runner process that is gone."""
    tokens: int
    """Tokens of output that its client has, which are not sent again."""

    @classmethod
    def of(cls, note: ReplayNote) -> Self:
        """The form of the API."""
        return cls(request=note.request, model=note.model, instance=note.instance, tokens=note.tokens)


def activity_routes(services: Services) -> APIRouter:
    """The last requests. Every key sees those of all clients, but no prompt and no output."""
    routes = APIRouter(tags=["server"])

    @routes.get("/v1/activity")
    async def activity(
        limit: int = Query(default=50, ge=1, le=1000, description="The most requests in the reply."),
    ) -> ActivityList:
        """The requests that run, and the last ones that have ended."""
        records = [record for record, _ in zip(services.activity, range(limit), strict=False)]
        return ActivityList(requests=[RequestActivity.of(each) for each in records])

    @routes.get("/v1/activity/events", response_class=Response)
    async def events(
        interval: float = Query(default=0, ge=0, le=5, description="The least seconds between two writes."),
    ) -> Response:
        """Server-sent events: ``request``, ``instances``, ``death`` and ``replay``."""
        return _ActivityStream(services, interval)

    return routes


@final
class _ActivityChanges:
    """The changes since the last look, as events of a stream. Holds no queue, however slow the client is."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.version = -1  # of the activity, at the last look
        self._told: dict[RequestRecord, tuple[int, int]] = {}  # the progress of requests in flight
        self._replays = services.activity.replays[-1].number if services.activity.replays else 0
        self._instances: object = None
        self._deaths = dict(self._count_deaths())

    def requests(self, *, progress: bool) -> Iterator[bytes]:
        """Requests that have entered another phase and, with ``progress``, all those that have made some."""
        activity, seen = self._services.activity, self.version
        self.version = activity.version
        for record in activity:
            if record.has_ended:
                if record.version > seen >= 0:
                    yield _event("request", RequestActivity.of(record))
                continue
            done = record.prefill_done, record.completion_tokens
            if record.version > seen or (progress and self._told.get(record) != done):
                self._told[record] = done
                yield _event("request", RequestActivity.of(record))
        self._told = {record: done for record, done in self._told.items() if not record.has_ended}
        for note in activity.replays:
            if note.number > self._replays:
                self._replays = note.number
                yield _event("replay", RequestReplay.of(note))

    def runners(self) -> Iterator[bytes]:
        """The instances if one has changed, and new deaths."""
        reports = self._services.pool.reports()
        for report in reports:
            kind = report.now.model_id, report.now.place, report.settings
            if report.deaths > self._deaths.get(kind, 0) and (failed := report.last_failure) is not None:
                self._deaths[kind] = report.deaths
                yield _event("death", RunnerDeath(
                    model=report.now.model_id, runner=report.now.place, code=failed.code, message=failed.message,
                    deaths=report.deaths, at=int(report.failed),
                ))  # fmt: skip
        states = [
            (each.now.instance, each.now.state, each.status.layers_loaded, each.deaths, each.reserved, each.measured)
            for each in reports
        ]
        if states != self._instances:
            self._instances = states
            outdated = self._services.models.is_outdated
            data = [Instance.of(each, outdated=outdated(each)) for each in reports]
            yield _event("instances", InstanceList(data=data, notices=self._services.notices))

    def _count_deaths(self) -> Iterator[tuple[tuple[str, str, str], int]]:
        for each in self._services.pool.reports():
            yield (each.now.model_id, each.now.place, each.settings), each.deaths


def _event(name: str, body: BaseModel) -> bytes:
    return b"event: " + name.encode() + b"\n" + sse.event(body.model_dump_json().encode())


@final
class _ActivityStream(Response):
    """Begins with the instances and the requests in flight. Ends when the server stops."""

    def __init__(self, services: Services, interval: float) -> None:
        super().__init__()
        self._services = services
        self._pause = max(_PAUSE_SECONDS, interval)
        self._tick = max(_TICK_SECONDS, interval)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_when_client_leaves, receive, tasks)
            headers = {"content-type": sse.MEDIA_TYPE, **sse.HEADERS}
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            async with aclosing(self._changes(once=scope["only_head"])) as changes:
                async for data in changes:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            tasks.cancel_scope.cancel()

    async def _changes(self, *, once: bool) -> AsyncGenerator[bytes]:
        changes = _ActivityChanges(self._services)
        yield b"".join((*changes.runners(), *changes.requests(progress=True)))
        ticked = wrote = anyio.current_time()
        while not (once or self._services.queues.closed):
            await anyio.sleep(max(_PAUSE_SECONDS, wrote + self._pause - anyio.current_time()))
            with anyio.move_on_after(max(0.0, ticked + self._tick - anyio.current_time())):
                await self._services.activity.wait(changes.version)
            now = anyio.current_time()
            parts: list[bytes] = []
            if ticks := now >= ticked + self._tick:
                ticked = now
                parts += changes.runners()
            parts += changes.requests(progress=ticks)
            if not parts and now >= wrote + sse.KEEP_ALIVE_SECONDS:
                parts.append(sse.comment("keep-alive"))
            if parts:
                yield b"".join(parts)
                wrote = anyio.current_time()
