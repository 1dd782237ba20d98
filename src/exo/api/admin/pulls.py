"""Pulling over HTTP: how far it is as server-sent events, or the end of it as one reply."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import ClassVar, Literal, Self, final

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from exo.api.http import sse
from exo.api.http.body import read_body
from exo.api.http.errors import INTERNAL_ERROR, ErrorBody, error_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.strict_model import RequestBody
from exo.api.http.unary_response import UnaryResponse, cancel_when_client_leaves
from exo.serving.app_state import Services
from exo.serving.errors import RequestError, ServingError
from exo.serving.pull_jobs import OnProgress, Pulled, from_pull_error
from exo.store.errors import PullError
from exo.store.progress import DownloadProgress, Step
from exo.worker.router import parse_model

log = logging.getLogger(__name__)

_PATH = "/v1/models/pull"
"""Also their place in the server's queues, so that a stop waits for pulls as it does for other requests."""


class PullRequest(RequestBody):
    """The body of ``POST /v1/models/pull``."""

    refuses_unknown: ClassVar[bool] = True

    model: str = Field(min_length=1, max_length=300, description="A model id or alias, optionally with @runner.")
    runner: str | None = Field(
        default=None,
        min_length=1,
        max_length=40,
        description="Whose files; by default those of the one that would serve it.",
    )
    quant: str | None = Field(
        default=None, min_length=1, max_length=40, description="A quantisation other than the card's, such as Q4_K_M."
    )
    stream: bool = Field(default=True, description="Tell how far it is; else the reply comes when all is there.")


class PullProgress(BaseModel):
    """One event of a stream. Sizes are bytes; ``done`` and ``total`` count all files, ``rate`` is bytes a second."""

    step: Step
    file: str
    file_done: int
    file_total: int
    done: int
    total: int
    rate: float
    seconds_left: float | None
    note: str
    """Why nothing comes at the moment, where that is known."""

    @classmethod
    def of(cls, progress: DownloadProgress) -> Self:
        """The wire's form."""
        return cls(**asdict(progress))


class PullDone(BaseModel):
    """The reply, and a stream's last event: the model is there."""

    step: Literal["done"] = "done"
    model: str
    runner: str
    quant: str
    """Of a GGUF file; of a folder, empty."""
    revision: str
    """The commit."""
    bytes: int
    path: str | None
    """What the runner loads."""

    @classmethod
    def of(cls, pulled: Pulled) -> Self:
        """The wire's form."""
        source = pulled.plan.source
        return cls(
            model=source.model_id,
            runner=source.runner,
            quant=pulled.plan.quant,
            revision=pulled.plan.revision,
            bytes=pulled.plan.total,
            path=str(pulled.found.path) if pulled.found.path is not None else None,
        )


def pull_routes(services: Services) -> APIRouter:
    """The one route."""
    routes = APIRouter(tags=["server"])

    async def pull(body: PullRequest, on_progress: OnProgress) -> PullDone:
        with services.queues.place(_PATH, 1):
            wish = parse_model(body.model)
            if None not in (body.runner, wish.runner) and body.runner != wish.runner:
                message = f"runner: model asks for {wish.runner} (got {body.runner!r})"
                raise RequestError(message, code="invalid_value", param="runner")
            name = body.model if body.runner is None else f"{wish.name}@{body.runner}"
            card, route = await services.choose(name)
            try:
                return PullDone.of(await services.pulls.pull(card, route.runner, body.quant, on_progress))
            except PullError as error:
                raise from_pull_error(error, param="quant" if body.quant is not None else "model") from error

    @routes.post(_PATH, response_model=PullDone, openapi_extra=json_body(PullRequest))
    async def pull_model(request: Request) -> Response:
        """Fetches the files that a runner needs for a model. It stops when the last client that waits for it leaves."""
        body = await read_body(request, PullRequest)

        async def whole() -> tuple[PullDone, Mapping[str, str]]:
            return await pull(body, _ignore), {}

        async def streamed(on_progress: OnProgress) -> PullDone:
            return await pull(body, on_progress)

        return _PullStream(streamed) if body.stream else UnaryResponse(whole)

    return routes


async def _ignore(_: DownloadProgress) -> None:
    """For a client that wants the end only."""


@final
class _PullStream(Response):
    """Begins with the first progress, so that what fails before gets an HTTP status. A failure later is an event."""

    def __init__(self, work: Callable[[OnProgress], Awaitable[PullDone]]) -> None:
        super().__init__()
        self._work = work
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Replies, as ASGI has it."""

        async def tell(progress: DownloadProgress) -> None:
            await self._write(send, sse.event(PullProgress.of(progress).model_dump_json().encode()))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_when_client_leaves, receive, tasks)
            result = await self._run(tell)
            if isinstance(result, PullDone):
                last = sse.event(result.model_dump_json().encode()) + sse.DONE
                await self._write(send, last, more=False)
            elif self._started:
                await self._write(send, sse.event(result.openai()), more=False)
            else:
                await result.response(scope["path"])(scope, receive, send)
            tasks.cancel_scope.cancel()

    async def _run(self, tell: OnProgress) -> PullDone | ErrorBody:
        try:
            return await self._work(tell)
        except ServingError as error:
            return error_body(error)
        except Exception:
            log.exception("a pull failed")
            return INTERNAL_ERROR

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        if not self._started:
            self._started = True
            headers = {"content-type": sse.MEDIA_TYPE, **sse.HEADERS}
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": raw})
        await send({"type": "http.response.body", "body": data, "more_body": more})
