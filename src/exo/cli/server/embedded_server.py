"""The running server or, if there is none, a server inside the command."""

import secrets
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import httpx

from exo.cli.server.http_client import is_up, server_client
from exo.config import Access, ApiKey, Settings

if TYPE_CHECKING:
    from exo.cards.catalogue import Catalogue


@contextmanager
def some_server(settings: Settings, catalogue: "Callable[[], Catalogue]") -> Generator[httpx.Client]:
    """A client of the running server, or else of one that ends with the context, together with its runners.

    The server's code is imported only if no server runs. Raises CommandError.
    """
    with server_client(settings) as client:
        if is_up(client):
            yield client
            return
    with _own_server(settings, catalogue()) as own, server_client(own) as client:
        yield client


@contextmanager
def _own_server(settings: Settings, catalogue: "Catalogue") -> Generator[Settings]:
    """The settings to reach it: its port, and a random key that keeps others on this machine out."""
    import uvicorn

    from exo.api.server import create_app, listen
    from exo.serving.app_state import Services

    access = Access(keys=(ApiKey("own", secrets.token_hex(32)),))
    settings = replace(settings, host="127.0.0.1", port=0, access=access)
    with listen(settings.host, settings.port) as listening:
        app = create_app(settings, Services(settings, catalogue))
        server = uvicorn.Server(
            uvicorn.Config(app, ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=1)
        )
        # Ctrl-C interrupts the main thread: it must end an answer, not the server.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield replace(settings, port=listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
