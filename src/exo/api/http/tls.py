"""TLS connections that count from their arrival on.

uvicorn gets to know a TLS connection when its handshake has ended. Clients that send nothing could take every file
descriptor before that.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import final

from exo.api.http.connection import HEAD_SECONDS, LINGER_SECONDS, BoundedConnection, make_room

log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5
"""The wait after a connection could not be accepted, as without a free file descriptor."""


@final
class Handshake:
    """A connection whose handshake has not ended. It is one of the server's ``connections`` until then."""

    def __init__(
        self,
        client: socket.socket,
        context: ssl.SSLContext,
        create: Callable[[], BoundedConnection],
        connections: "set[BoundedConnection | Handshake]",
    ) -> None:
        self._client = client
        self._context = context
        self._create = create
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        connections.add(self)
        self._task = self._loop.create_task(self._run())

    def claim(self) -> tuple[int, float]:
        """Handshakes are closed before any other connection, the oldest first."""
        return 0, self._since

    def abort(self) -> None:
        """Closes the connection."""
        self._connections.discard(self)
        self._loop.call_soon(self._task.cancel)  # the task has begun by then, and closes the socket

    shutdown = abort
    """uvicorn's name, when the server ends."""

    async def _run(self) -> None:
        with suppress(OSError):  # the client has left, does not speak TLS, or is too slow
            await self._loop.connect_accepted_socket(
                self._connection,
                self._client,
                ssl=self._context,
                ssl_handshake_timeout=HEAD_SECONDS,
                ssl_shutdown_timeout=LINGER_SECONDS,  # an idle client does not read, and so does not answer
            )
        self._connections.discard(self)

    def _connection(self) -> BoundedConnection:
        connection = self._create()
        connection.before = self
        return connection


@final
class TlsListener:
    """Accepts connections on a listening socket from ``start`` until ``close``.

    ``create`` makes the protocol of a connection. ``connections`` are the server's, of which there may be ``most``.
    """

    def __init__(
        self,
        listening: socket.socket,
        context: ssl.SSLContext,
        create: Callable[[], BoundedConnection],
        connections: "set[BoundedConnection | Handshake]",
        most: int,
    ) -> None:
        self._listening = listening
        self._context = context
        self._create = create
        self._connections = connections
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._listening.setblocking(False)
        self._loop.add_reader(self._listening, self._accept)

    def close(self) -> None:
        """Accepts no more connections; those that are here stay."""
        self._loop.remove_reader(self._listening)
        if self._retry is not None:
            self._retry.cancel()

    def _accept(self) -> None:
        try:
            client, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("a connection could not be accepted: %s", error)
            self._loop.remove_reader(self._listening)
            self._retry = self._loop.call_later(_RETRY_SECONDS, self.start)
            return
        client.setblocking(False)
        handshake = Handshake(client, self._context, self._create, self._connections)
        make_room(self._connections, handshake, self._most)
