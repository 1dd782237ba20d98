"""``exo stop``."""

import json

from exo.cli.console import out, say
from exo.cli.options import AsJson, Model, ServerOptions
from exo.cli.server.http_client import ask, server_client


def stop(model: Model, *, server: ServerOptions, as_json: AsJson = False) -> None:
    """Unload a model from the running server and free its memory. The server itself stops with Ctrl-C."""
    with server_client(server.settings()) as client:
        reply = ask(client, "/v1/models/unload", body={"model": model}, seconds=None)
    if as_json:
        out.print_json(reply.decode())
    else:
        say(f"{model} {'is unloaded' if json.loads(reply)['unloaded'] else 'was not loaded'}")
