"""Gives each request an id and a record, which holds its facts and progress until the end of its reply."""

import re
from collections.abc import Callable
from typing import final
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exo.api.http.log import log_access
from exo.api.http.middleware import route_path
from exo.serving.activity import Activity, Dialect, RequestRecord, set_current
from exo.terminal import printable

REQUEST_ID_HEADER = "x-request-id"
_ACCEPTED = re.compile(r"[!-~]{1,128}")
_CLIENT_CHARACTERS = 80
_PATH_CHARACTERS = 200


def new_request_id() -> str:
    """An id for a request whose client has sent none."""
    return f"req_{uuid4().hex}"


def accepted_or_new(given: str) -> str:
    """The client's id if it is short, printable ASCII; otherwise a new one."""
    return given if _ACCEPTED.fullmatch(given) else new_request_id()


@final
class RequestRecords:
    """An ASGI application that makes the record of each request to ``app``, and gives the reply the request's id."""

    def __init__(
        self, app: ASGIApp, *, activity: Activity, on_end: Callable[[RequestRecord, Headers], None] | None = None
    ) -> None:
        """``on_end`` gets the record of each request that is over, and its headers."""
        self._app = app
        self._on_end = on_end
        self._activity = activity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        own = accepted_or_new(headers.get(REQUEST_ID_HEADER, ""))
        path = route_path(scope["path"])
        record = RequestRecord(self._activity, own, _client(scope, headers), dialect_of(path), _shown(path))
        record.method = scope["method"]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = own
            await send(message)

        set_current(record)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            record.end()
            log_access(record)
            if self._on_end is not None:
                self._on_end(record, headers)


def _client(scope: Scope, headers: Headers) -> str:
    """The first word of the client's own name, and its address."""
    words = headers.get("user-agent", "").split(maxsplit=1)
    address = scope["client"][0] if scope.get("client") else ""
    return " ".join(filter(None, (printable(words[0])[:_CLIENT_CHARACTERS] if words else "", address)))


def dialect_of(path: str) -> Dialect:
    """The API that a path belongs to."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    if path.startswith("/api/"):
        return "ollama"
    if path in ("/", "/docs") or path.startswith("/page/"):
        return "exo"
    own = path.startswith("/v1/") and not path.startswith("/v1/rerank")
    return "openai" if own else "llama-server"


def _shown(path: str) -> str:
    return printable(path[:_PATH_CHARACTERS]).replace("\n", "\\n").replace("\t", "\\t")
