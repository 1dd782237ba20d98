"""A real server on a free port of the loopback interface, its runners the fake one."""

import socket
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from exo.api.app import create_app
from exo.config import Settings
from exo.models.card import ModelCard
from exo.models.catalogue import Catalogue
from tests import fake_runner

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{{ raise_exception('the last message must be the user\\'s') }}{% endif %}"
)


@contextmanager
def serve(directory: Path, *cards: ModelCard, load: Iterable[str] = ()) -> Generator[str]:
    """The server's base URL. Runners' logs are in ``directory``."""
    settings = Settings(
        host="127.0.0.1",
        port=0,
        models_directory=directory,
        models_directories=(directory,),
        cards_directory=directory,
        log_directory=directory,
    )
    catalogue = Catalogue({card.model_id: card for card in cards}, {}, ())
    app = create_app(settings, catalogue, load=load, commands={"cuda": fake_runner.COMMAND})
    listening = socket.create_server(("127.0.0.1", 0))  # so that a client may connect before the server runs
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
