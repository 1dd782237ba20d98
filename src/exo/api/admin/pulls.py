"""Downloads over HTTP: the progress as server-sent events, or the result in one reply."""

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import ClassVar, Literal, Self, final

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from exo.api.http import sse
from exo.api.http.body import RequestBody, read_body
from exo.api.http.error_reply import error_reply
from exo.api.http.errors import INTERNAL_ERROR, ErrorBody, error_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.unary_response import UnaryResponse, cancel_when_client_leaves
from exo.serving.app_state import Services
from exo.serving.errors import RequestError, ServingError
from exo.serving.pull_jobs import Pulled, from_pull_error
from exo.store.errors import PullError
from exo.store.progress import DownloadProgress

log = logging.getLogger(__name__)

_PATH = "/v1/models/pull"
"""Also the name of their queue: a stop of the server waits for downloads as it does for other requests."""


class PullRequest(RequestBody):
    """The body of ``POST /v1/models/pull``."""

    refuses_unknown: ClassVar[bool] = True

    model: str = Field(min_length=1, max_length=300, description="A model id or alias, optionally with @runner.")
    runner: str | None = Field(
        default=None,
        min_length=1,
        max_length=40,
        description="The runner whose files are wanted; by default the one that would serve the model.",
    )
    quant: str | None = Field(
        default=None, min_length=1, max_length=40, description="A quantisation other than the card's, such as Q4_K_M."
    )
    stream: bool = Field(default=True, description="Send the progress; otherwise the reply comes at the end.")


class PullDone(BaseModel):
    """The reply, and the last event of a stream: the model is on disk."""

    step: Literal["done"] = "done"
    model: str
    runner: str
    quant: str
    """The quantisation of a GGUF file; empty for a folder."""
    revision: str
    bytes: int
    path: str | None
    """The file or folder that the runner loads."""

    @classmethod
    def of(cls, pulled: Pulled) -> Self:
        """The form of the API."""
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
    """The route of downloads."""
    routes = APIRouter(tags=["server"])

    async def pull(body: PullRequest) -> AsyncGenerator[DownloadProgress | Pulled]:
        model = services.routing.resolve(body.model)
        if body.runner is not None:
            if model.runner not in (None, body.runner):
                message = f"runner: model asks for {model.runner} (got {body.runner!r})"
                raise RequestError(message, code="invalid_value", param="runner")
            model = replace(model, runner=body.runner)
        route = await services.routing.choose(model)
        try:
            async with aclosing(services.pulls.pull(model.card, route.runner, body.quant)) as steps:
                async for step in steps:
                    yield step
        except PullError as error:
            raise from_pull_error(error, param="quant" if body.quant is not None else "model") from error

    @routes.post(_PATH, response_model=PullDone, openapi_extra=json_body(PullRequest))
    async def pull_model(request: Request) -> Response:
        """Downloads a runner's files for a model. The download stops when the last client that waits for it leaves."""
        body = await read_body(request, PullRequest)

        async def whole() -> tuple[PullDone, Mapping[str, str]]:
            with services.queues.place(_PATH, 1):
                async with aclosing(pull(body)) as steps:
                    *_, last = [step async for step in steps]
            assert isinstance(last, Pulled)
            return PullDone.of(last), {}

        return _PullStream(services, pull(body)) if body.stream else UnaryResponse(whole)

    return routes


@final
class _PullStream(Response):
    """Begins with the first progress, so that an earlier failure gets an HTTP status. A later one is an event."""

    def __init__(self, services: Services, steps: AsyncGenerator[DownloadProgress | Pulled]) -> None:
        super().__init__()
        self._services = services
        self._steps = steps
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_when_client_leaves, receive, tasks)
            error = await self._run(send)
            if error is None:
                await self._write(send, sse.DONE, more=False)
            elif self._started:
                await self._write(send, sse.event(error.openai()), more=False)
            else:
                await error_reply(error)(scope, receive, send)
            tasks.cancel_scope.cancel()

    async def _run(self, send: Send) -> ErrorBody | None:
        try:
            with self._services.queues.place(_PATH, 1):
                async with aclosing(self._steps) as steps:
                    async for step in steps:
                        body = PullDone.of(step) if isinstance(step, Pulled) else step
                        await self._write(send, sse.event(to_json(body)))
        except ServingError as error:
            return error_body(error)
        except Exception:
            log.exception("a download failed")
            return INTERNAL_ERROR
        return None

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        if not self._started:
            self._started = True
            headers = {"content-type": sse.MEDIA_TYPE, **sse.HEADERS}
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": raw})
        await send({"type": "http.response.body", "body": data, "more_body": more})
