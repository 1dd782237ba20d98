"""Limits on connections: how many there are, and how long a client may stop reading.

Each connection takes a file descriptor. Without a limit, idle clients could take all of them, and the server could
neither accept a client nor start a runner.

Data for a client that does not read fills the kernel's buffer and then 64 KiB of the server's. From then on the reply
waits, with the slot of its request, until the client is disconnected.
"""

import asyncio
import resource
from contextlib import suppress
from typing import cast

from exo.api.http.connection import BoundedConnection
from exo.api.http.errors import ErrorBody

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
            if len(self.connections) <= most:
                return
            others = cast("set[BoundedConnection]", self.connections - {self})
            claims = {each: claim for each in others if (claim := each.claim()) is not None}
            if claims:
                min(claims, key=lambda each: claims[each]).transport.abort()
            else:
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
