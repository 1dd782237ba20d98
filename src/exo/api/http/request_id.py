"""The id of each request: the client's or a new one. The reply's headers have it, and each log line that it causes."""

import logging
import re
from typing import final
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exo.serving.request_id import current_request

REQUEST_ID_HEADER = "x-request-id"
_ACCEPTED = re.compile(r"[!-~]{1,128}")


def new_request_id() -> str:
    """An id for a request whose client has sent none."""
    return f"req_{uuid4().hex}"


@final
class RequestIds:
    """An ASGI application that gives each request to ``app`` an id. The client's own must be printable ASCII."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        own = given if _ACCEPTED.fullmatch(given) else new_request_id()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = own
            await send(message)

        token = current_request.set(own)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            current_request.reset(token)


def add_request_id(record: logging.LogRecord) -> bool:
    """A filter for log handlers that adds the id to the message. Keeps every record."""
    if own := current_request.get():
        record.msg, record.args = f"{record.getMessage()} (request {own})", ()
    return True
