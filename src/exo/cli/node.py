"""``exo node``: the program that a server runs on each of its other hosts."""

from typing import Annotated

import typer

from exo.config import Settings
from exo.serving.hosts.node import run_node


def node(server: Annotated[str, typer.Argument(help="The id of the server.")] = "") -> None:
    """Tell a server on another machine what this one has, and fetch models for it. A server starts it."""
    run_node(Settings.load(), server)
