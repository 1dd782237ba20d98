"""A client that takes little CPU time, because it often shares the cores with the server that it measures.

While a reply comes, it only stores the bytes and the time of each read; ``reading`` parses them afterwards. Each
request has its own connection.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast, final
from urllib.parse import urlsplit

from exo.bench.options import BenchOptions
from exo.exit_code import CommandError, ExitCode

_PATHS = {"completions": "/completions", "chat": "/chat/completions"}
_LAST_CHUNK = b"0\r\n\r\n"
"""The end of a chunked body in HTTP/1.1. No other read ends like this: events end in ``}`` or ``]``."""


@dataclass(slots=True)
class Exchange:
    """One request and its reply. Times are seconds by ``time.perf_counter``."""

    body: bytes
    began: float = 0.0
    """When the connection was opened or was due to be opened."""
    ended: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list[tuple[float, bytes]])
    """The time and the bytes of every read, including the head."""
    failure: str = ""
    """Why the connection failed."""
    cut: bool = False
    """Whether the client hung up."""


class Client:
    """Sends requests to one endpoint of one server."""

    def __init__(self, options: BenchOptions) -> None:
        """Raises CommandError if the URL is invalid."""
        url = urlsplit(options.url if "://" in options.url else f"http://{options.url}")
        try:
            port = url.port
        except ValueError:
            port = 0
        if url.scheme not in ("http", "https") or not url.hostname or port == 0:
            raise CommandError(f"the URL must be like http://127.0.0.1:52415 (got {options.url!r})", ExitCode.USAGE)
        self._host = url.hostname
        self._port = port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        base = url.path.rstrip("/")
        path = (base if base.endswith("/v1") else f"{base}/v1") + _PATHS[options.endpoint]
        key = options.api_key.get_secret_value() if options.api_key else ""
        if not key.isprintable() or not key.isascii():
            raise CommandError("--api-key: must be printable ASCII", ExitCode.USAGE)
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {url.netloc.rpartition('@')[2]}",
            "Connection: close",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            *([f"Authorization: Bearer {key}"] if key else []),
        ]
        self._head = "".join(f"{line}\r\n" for line in lines)

    async def send(self, exchange: Exchange, heard: Callable[[], None] | None = None) -> None:
        """Sends the body and returns at the end of the reply. Calls ``heard`` after each read.

        Failures are stored in ``exchange``. A cancellation hangs up and is stored as well.
        """
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        head = f"{self._head}Content-Length: {len(exchange.body)}\r\n\r\n".encode()
        exchange.began = exchange.began or time.perf_counter()
        receiver = _Receiver(head + exchange.body, exchange, over, heard)
        transport: asyncio.BaseTransport | None = None
        try:
            transport, _ = await loop.create_connection(lambda: receiver, self._host, self._port, ssl=self._tls)
            await over
        except OSError as error:
            exchange.failure = f"cannot connect: {error.strerror or error}"
        except asyncio.CancelledError:
            exchange.cut = True
            raise
        finally:
            exchange.ended = time.perf_counter() if exchange.cut or not exchange.pieces else exchange.pieces[-1][0]
            if transport is not None:
                transport.close()


@final
class _Receiver(asyncio.Protocol):
    def __init__(
        self, request: bytes, exchange: Exchange, over: asyncio.Future[None], heard: Callable[[], None] | None
    ) -> None:
        self._request = request
        self._exchange = exchange
        self._over = over
        self._heard = heard

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self._exchange.pieces.append((time.perf_counter(), data))
        if self._heard is not None:
            self._heard()
        if data.endswith(_LAST_CHUNK):
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self._over.done():
            self._exchange.failure = f"the connection broke: {exc}"
        self._end()

    def _end(self) -> None:
        if not self._over.done():
            self._over.set_result(None)
