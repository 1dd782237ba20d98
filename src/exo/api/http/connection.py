"""A client's connection: uvicorn's, with bounds on a request's head and time, on connections and on unread replies.

uvicorn itself reads a head of any length and waits for the rest of a request without limit. It also loses the body of a
request that asks for an upgrade, and then parses that body as the next request.

Each connection takes a file descriptor. Without a limit, idle clients could take all of them, and the server could
neither accept a client nor start a runner.

Data for a client that does not read fills the kernel's buffer and then 64 KiB of the server's. From then on the reply
waits, with the slot of its request, until the client is disconnected.
"""

import asyncio
import resource
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any, Literal, Protocol, cast

import httptools
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from exo.api.http.errors import PROTECTION, ErrorBody
from exo.api.http.log import log_refusal
from exo.api.http.request_record import REQUEST_ID_HEADER, new_request_id

HEAD_LIMIT = 64 << 10
"""Bytes of a request's line and headers."""
HEADER_LIMIT = 128
HEAD_SECONDS = 20.0
"""The time for a request's head, from the connection or, on a kept one, from the head's first byte."""
BODY_SECONDS = 120.0
"""The time for a request's body, from the end of its head."""
LINGER_SECONDS = 1.0
"""How long a refused client's data is discarded. After an immediate close it might not get the reply."""

_RESERVED = 256
"""File descriptors that connections leave to runners, model files and logs; half of them where there are fewer than
twice as many."""
_MOST_CONNECTIONS = 8192
_MACOS_FILES = 10240
"""The largest soft limit that macOS accepts where the hard limit is unlimited."""

_TOO_MANY = ErrorBody(
    status=503,
    message="the server has no room for another connection; try again soon",
    code="too_many_connections",
    headers={"retry-after": "1"},
)
_TOO_LARGE = ErrorBody(
    status=431,
    message=f"the request's head is too large; accepted are {HEAD_LIMIT} bytes and {HEADER_LIMIT} headers",
    code="headers_too_large",
)
_TOO_SLOW = ErrorBody(status=408, message="the request did not arrive in time", code="request_timeout")
_MALFORMED = ErrorBody(status=400, message="this is not an HTTP request", code="malformed_request")
_NO_PROXY = ErrorBody(status=405, message="this server is no proxy: CONNECT is not accepted", code="method_not_allowed")
_UNKNOWN_CODING = ErrorBody(
    status=501,
    message="the only transfer-encoding accepted is chunked, in HTTP/1.1",
    code="unsupported_transfer_encoding",
)


_SLICE = HEAD_LIMIT // 4
"""Bytes that the parser gets at once. A head may exceed its limit by as much."""


class _RefusedError(Exception):
    """Raised in a callback of the parser, which then stops."""

    def __init__(self, body: ErrorBody) -> None:
        super().__init__(body.message)
        self.body = body


class _Counted(Protocol):
    """A connection, or a handshake that may become one."""

    def claim(self) -> tuple[int, float] | None: ...

    def abort(self) -> None: ...


class BoundedConnection(HttpToolsProtocol):
    """A connection to hand to ``uvicorn.Config`` as ``http``."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._deadline: asyncio.TimerHandle | None = None
        self._reading: Literal["nothing", "head", "body"] = "head"
        """The part of a request that comes next; ``nothing`` between two requests."""
        self._received = 0
        """Bytes read since the last request was complete."""
        self._head = 0
        """Parsed bytes of the current head and of the trailers after its body."""
        self._answering: RequestResponseCycle | None = None
        """The last request that the application got. Later ones are in uvicorn's pipeline."""
        self._refusal: ErrorBody | None = None
        """The last reply on this connection. Once it is set, the client's data is discarded."""
        self._waits_since = self.loop.time()
        """When the connection was made or, later, when the last reply ended."""
        self.before: object = None
        """The member of the server's connections that this one replaces."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        cast("set[object]", self.connections).discard(self.before)
        super().connection_made(transport)
        self._give_time(HEAD_SECONDS)

    def claim(self) -> tuple[int, float] | None:
        """The order in which connections are closed when there are too many; None for one that has to stay.

        A connection without a request goes first, then one whose request is still arriving, each time the oldest. One
        stays while a request is answered or part of a reply has not been sent.
        """
        if self._replying() or self.pipeline or self.transport.is_closing() or self.transport.get_write_buffer_size():
            return None
        return 1 + (self._received > 0), self._waits_since

    def abort(self) -> None:
        """Closes the connection at once."""
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)
        # uvicorn only notifies the last request of a pipeline, which is not the one that a runner is working on.
        if self._answering is not None and not self._answering.response_complete:
            _abandon(self._answering)

    def data_received(self, data: bytes) -> None:
        # The parser does not tell where a request ends in a slice; the bytes behind it there are not counted.
        for start in range(0, len(data), _SLICE):
            if self._refusal is None:
                self._take(data[start : start + _SLICE])

    def _take(self, data: bytes) -> None:
        if self._reading != "nothing":
            self._unset_keepalive_if_required()
        self._received += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            raised = error.__context__
            self.refuse(raised.body if isinstance(raised, _RefusedError) else _MALFORMED)
        else:
            if self._reading != "body" and self._received > HEAD_LIMIT:
                self.refuse(_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._reading = "head"
        self._head = 0
        if self._deadline is None:  # the first request's time runs from the connection
            self._give_time(HEAD_SECONDS)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers count towards the limits, but are not added to the headers, which have been checked already."""
        self._count(len(name) + len(value) + len(b": \r\n"))
        if self._reading == "head":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise _RefusedError(_NO_PROXY)
        if self.parser.should_upgrade():
            return  # see _parse
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (codings != [b"chunked"] or self.parser.get_http_version() != "1.1"):
            raise _RefusedError(_UNKNOWN_CODING)
        super().on_headers_complete()  # raises an error if the target has no path
        self._reading = "body"
        self._give_time(BODY_SECONDS)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._reading = "nothing"
        self._received = 0
        self._stop_clock()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._waits_since = self.loop.time()
        if self._reading == "head":
            self._unset_keepalive_if_required()  # the next request is on its way, and its head has a deadline
        if self._refusal is not None and not self._replying():
            self._write_refusal(self._refusal)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, _without_chunks(app, cycle) if cycle.scope["http_version"] == "1.0" else app)

    def _parse(self, data: bytes) -> None:
        """Raises ``httptools.HttpParserError``.

        At the end of a head that asks for an upgrade the parser stops and takes the request for complete. No upgrade is
        accepted here, so the request is one like any other (RFC 9110, section 7.8): a new parser gets its head without
        the wish, and then what follows the head.
        """
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
            head = b"".join(self._head_without_upgrade())
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn
            self.parser.feed_data(head)

    def _head_without_upgrade(self) -> Iterator[bytes]:
        """Rebuilds the head. Without an ``Upgrade`` header, ``Connection: upgrade`` means nothing."""
        yield b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        yield from (b"%b: %b\r\n" % (name, value) for name, value in self.headers if name != b"upgrade")
        yield b"\r\n"

    def _count(self, length: int) -> None:
        self._head += length
        if self._head > HEAD_LIMIT or len(self.headers) >= HEADER_LIMIT:
            raise _RefusedError(_TOO_LARGE)

    def _give_time(self, seconds: float) -> None:
        self._stop_clock()
        self._deadline = self.loop.call_later(seconds, self._out_of_time)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _out_of_time(self) -> None:
        """A request behind one that is being answered is not late, because the server may not be reading it."""
        if self._is_behind_another():
            self._give_time(HEAD_SECONDS if self._reading == "head" else BODY_SECONDS)
        else:
            self.refuse(_TOO_SLOW)

    def _replying(self) -> bool:
        return self._answering is not None and not self._answering.response_complete

    def _is_behind_another(self) -> bool:
        """Whether an earlier request has no reply yet, so that the present one must not get one."""
        return self._replying() and not (self._reading == "body" and self.cycle is self._answering)

    def refuse(self, error: ErrorBody) -> None:
        """Sends the error after the replies to earlier requests, and closes the connection."""
        self._refusal = error
        self._stop_clock()
        if self._is_behind_another():
            if self._reading == "body":
                self.pipeline.popleft()  # this request, which would wait for the rest of its body
        elif self._reading != "body":
            self._write_refusal(error)
        elif self.cycle.response_started:
            self.transport.close()
        else:
            _abandon(self.cycle)
            self._write_refusal(error)

    def _write_refusal(self, error: ErrorBody) -> None:
        if self.transport.is_closing():
            return
        body = error.openai()
        log_refusal(self.client[0] if self.client else "", error)
        named = {REQUEST_ID_HEADER: new_request_id(), **PROTECTION, **error.headers}
        headers = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}connection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[error.status] + head.encode() + body)
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


def _without_chunks(app: ASGI3Application, cycle: RequestResponseCycle) -> ASGI3Application:
    """``app`` for a client of HTTP/1.0, which knows no chunks: a body without a length ends with the connection.

    uvicorn writes a body as it is if its length has been announced, so each part is announced as it is sent.
    """

    async def replying(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        without_length = False

        async def send_plain(message: ASGISendEvent) -> None:
            nonlocal without_length
            while cycle.flow.write_paused and not cycle.disconnected:
                await cycle.flow.drain()  # here, so that nothing else is sent between the announcement and the part
            if message["type"] == "http.response.start":
                without_length = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
                if without_length:
                    cycle.chunked_encoding = False
            elif message["type"] == "http.response.body" and without_length:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return replying


def _abandon(cycle: RequestResponseCycle) -> None:
    """Notifies the application that its client has left."""
    cycle.disconnected = True
    cycle.message_event.set()


def raise_file_limit() -> None:
    """Raises the soft limit of open files to the hard limit. The runners inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for soft in (hard, _MACOS_FILES):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            return


def connection_limit() -> int:
    """The number of connections that leave enough file descriptors to everything else."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return min(_MOST_CONNECTIONS, max(1, files - min(_RESERVED, files // 2)))


def make_room(connections: Collection[_Counted], newest: _Counted, most: int) -> bool:
    """Closes the connection with the least claim if there are more than ``most``.

    Returns False if all others have to stay.
    """
    if len(connections) <= most:
        return True
    claims = {each: claim for each in connections if each is not newest and (claim := each.claim()) is not None}
    if claims:
        min(claims, key=lambda each: claims[each]).abort()
    return bool(claims)


def limited_connection(stall_seconds: float, most: int) -> type[BoundedConnection]:
    """The connection to hand to ``uvicorn.Config`` as ``http``.

    It is aborted when its client stops reading for ``stall_seconds``. When there are more than ``most``, the one with
    the least claim is closed, or the new one if all others are being answered.
    """

    class Connection(BoundedConnection):
        """Uvicorn's protocol; its transport tells it when the buffer is full and when it has drained."""

        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if not make_room(cast("set[_Counted]", self.connections), self, most):
                self.refuse(_TOO_MANY)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(stall_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._forgive()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forgive()
            super().connection_lost(exc)

        def _forgive(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

    return Connection
