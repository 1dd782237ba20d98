"""A server to ask: the one that is up or, where there is none, one of the command's own."""

import secrets
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import httpx

from exo.cli.http_client import is_up, server_client
from exo.config import Access, ApiKey, Settings

if TYPE_CHECKING:
    from exo.cards.catalogue import Catalogue


@contextmanager
def some_server(settings: Settings, catalogue: "Callable[[], Catalogue]") -> Generator[httpx.Client]:
    """A client of the running server, else of a server that ends with the context, as do its runners.

    Nothing of a server is imported where one is up. Raises CommandError.
    """
    with server_client(settings) as client:
        if is_up(client):
            yield client
            return
    with _own_server(settings, catalogue()) as own, server_client(own) as client:
        yield client


@contextmanager
def _own_server(settings: Settings, catalogue: "Catalogue") -> Generator[Settings]:
    """Where it is, and the key without which nobody else on this machine may use it."""
    import uvicorn

    from exo.api.app import create_app
    from exo.api.server import listen
    from exo.serving.app_state import Services

    access = Access(keys=(ApiKey("own", secrets.token_hex(32)),))
    settings = replace(settings, host="127.0.0.1", port=0, access=access)
    with listen(settings.host, settings.port) as listening:
        app = create_app(settings, Services(settings, catalogue))
        server = uvicorn.Server(
            uvicorn.Config(app, ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=1)
        )
        # Not in the main thread, which the terminal's interrupts reach: they end an answer, and not the server.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield replace(settings, port=listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
