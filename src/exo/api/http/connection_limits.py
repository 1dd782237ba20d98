"""Clients that do not read what they are sent.

What is sent to them waits in their connection, first in the kernel's buffer, then in 64 KiB of the server's; when that
is full the reply stands still. A client that lets it stand is cut off, and with it goes the request: its slot is free.
"""

import asyncio

from exo.api.http.connection import BoundedConnection


def cutting_off_after(seconds: float) -> type[BoundedConnection]:
    """The connection to hand to ``uvicorn.Config`` as ``http``: aborted when its client leaves it full so long."""

    class Connection(BoundedConnection):
        """Uvicorn's protocol, told by its transport when the buffer is full and when it has drained."""

        _stalled: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(seconds, self.transport.abort)

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
