"""A real server on a free port of the loopback interface, with the fake runner for its runners."""

import socket
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from exo.api.http.connection import BoundedConnection
from exo.api.server import create_app
from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue
from exo.config import Access, Limits, Settings
from exo.serving.app_state import Services
from tests.support import fake_runner

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{{ raise_exception('the last message must be the user\\'s') }}{% endif %}"
)

TOOLS_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> <tool_call>{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.reasoning_content %} ({{ message.reasoning_content }}){% endif %}"
    "{% for call in message.tool_calls or [] %} {{ call.id }}={{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}"
    "{% if message.tool_call_id %} for {{ message.tool_call_id }} of {{ message.name }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if enable_thinking is defined %}{{ '<think>' if enable_thinking else '<think></think>' }}{% endif %}"
)
"""Knows tools, earlier calls and a switch for reasoning."""


@contextmanager
def serve(
    directory: Path,
    *cards: ModelCard,
    load: Iterable[str] = (),
    limits: Limits | None = None,
    access: Access | None = None,
    commands: Mapping[str, Sequence[str]] = {"cuda": fake_runner.COMMAND},
    speeds_file: Path | None = None,
    strict: bool = False,
    image_hosts: tuple[str, ...] = (),
    upstream_api: bool = True,
) -> Generator[str]:
    """Yields the server's base URL. The runners' logs are in ``directory``."""
    settings = Settings(
        host="127.0.0.1",
        port=0,
        models_directory=directory,
        models_directories=(directory,),
        cards_directory=directory,
        log_directory=directory,
        limits=limits or Limits(),
        access=access or Access(),
        speeds_file=speeds_file,
        strict=strict,
        image_hosts=image_hosts,
        upstream_api=upstream_api,
    )
    aliases = {alias: (card.model_id,) for card in cards for alias in card.aliases}
    catalogue = Catalogue({card.model_id: card for card in cards}, aliases, ())
    app = create_app(settings, Services(settings, catalogue, commands), load=load)
    listening = socket.create_server(("127.0.0.1", 0))  # so that a client may connect before the server runs
    server = uvicorn.Server(uvicorn.Config(app, http=BoundedConnection, ws="none", log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
