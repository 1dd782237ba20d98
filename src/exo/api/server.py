"""The server as a program: one socket, uvicorn on it, until a signal."""

import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterable
from types import FrameType

import uvicorn

from exo.api.app import create_app
from exo.config import Settings
from exo.models.catalogue import Catalogue

GRACEFUL_SECONDS = 5
"""How long open connections may go on after the signal to stop."""


class ListenError(Exception):
    """The address cannot be listened on; the message says why and what to do."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Bound before anything is started, so that a port in use costs nothing. Raises ListenError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} on {host} is in use; stop what is using it or give another with --port"
        else:
            reason = f"cannot listen on {host} port {port}: {error.strerror or error}"
        raise ListenError(reason) from error


def serve_forever(
    settings: Settings, catalogue: Catalogue, load: Iterable[str], on_listening: Callable[[str], None]
) -> None:
    """Serves until SIGINT or SIGTERM; every runner has then ended. ``on_listening`` gets the URL.

    Raises ListenError.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with listen(settings.host, settings.port) as listening:
        app = create_app(settings, catalogue, load=load)
        config = uvicorn.Config(
            app, loop="uvloop", log_config=None, access_log=False, timeout_graceful_shutdown=GRACEFUL_SECONDS
        )
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        on_listening(f"http://{host}:{listening.getsockname()[1]}")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _already_handled)
        uvicorn.Server(config).run(sockets=[listening])


def _already_handled(_number: int, _frame: FrameType | None) -> None:
    """Once uvicorn has shut down it raises the signal again; by then there is nothing left to do but to exit with 0."""
