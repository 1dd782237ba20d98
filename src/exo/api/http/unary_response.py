"""Replies that are sent in one piece, unless the client leaves before."""

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import TypeVar, cast

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup
from fastapi.responses import Response
from pydantic import BaseModel, RootModel
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from exo.api.http.error_reply import error_reply
from exo.api.http.errors import INTERNAL_ERROR, ErrorBody, error_body
from exo.serving.errors import ServingError

log = logging.getLogger(__name__)

_PIECE = 16
"""Elements of a list, each up to some thousand numbers, that are encoded at once."""
_TURN_SECONDS = 0.002
T = TypeVar("T")


class UnaryResponse(Response):
    """Computes its body while the client waits, and stops when the client leaves.

    ``work`` returns the body and its headers, and raises ``ServingError``.
    """

    def __init__(self, work: Callable[[], Awaitable[tuple[BaseModel, Mapping[str, str]]]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_when_client_leaves, receive, tasks)
            result = await self._run()
            reply = error_reply(result) if isinstance(result, ErrorBody) else result
            await reply(scope, receive, send)
            tasks.cancel_scope.cancel()

    async def _run(self) -> Response | ErrorBody:
        try:
            body, headers = await self._work()
        except ServingError as error:
            return error_body(error)
        except Exception:
            log.exception("a request failed")
            return INTERNAL_ERROR
        return Response(await _encoded(body), headers=dict(headers), media_type="application/json")


async def _encoded(body: BaseModel) -> bytes:
    """The body as JSON. Long lists are encoded in pieces, so that a large reply does not delay other streams."""
    if isinstance(body, RootModel):
        return await _encoded_list(cast(RootModel[list[object]], body).root)
    values: dict[str, object] = dict(body)
    lists = {name: cast(list[object], value) for name, value in values.items() if isinstance(value, list)}
    lists = {name: value for name, value in lists.items() if len(value) > _PIECE}
    data = body.model_copy(update={name: list[object]() for name in lists}).model_dump_json().encode()
    for name, value in lists.items():
        field = f'"{name}":'.encode()
        data = data.replace(field + b"[]", field + await _encoded_list(value), 1)
    return data


async def _encoded_list(items: Sequence[object]) -> bytes:
    return b"[" + b",".join([to_json(piece)[1:-1] async for piece in in_pieces(items)]) + b"]"


async def in_pieces(items: Sequence[T], size: int = _PIECE) -> AsyncGenerator[Sequence[T]]:
    """``items`` in pieces. Other tasks run in between."""
    began = time.monotonic()
    for at in range(0, len(items), size):
        yield items[at : at + size]
        if time.monotonic() - began > _TURN_SECONDS:
            await anyio.lowlevel.checkpoint()
            began = time.monotonic()


async def cancel_when_client_leaves(receive: Receive, tasks: TaskGroup) -> None:
    """Cancels ``tasks`` when the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    tasks.cancel_scope.cancel()
