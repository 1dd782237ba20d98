"""``exo rm``: deletes the downloaded files of a model, unless a server has it loaded."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from exo.cards.card import ModelCard
from exo.cli.console import say, warn
from exo.cli.models.local_models import (
    Kept,
    card_of,
    catalogue_of,
    check_runner,
    kept,
    size_of_prefixes,
    store_of,
)
from exo.cli.options import Card, ModelsDir, Quant, Runner, ServerOptions
from exo.cli.server.http_client import ask, is_up, server_client
from exo.config import Settings
from exo.exit_code import CommandError, ExitCode
from exo.store.errors import PullError
from exo.store.folder import folder_name
from exo.store.store import Store


def remove(
    model: Card,
    *,
    runner: Runner = None,
    quant: Quant = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    models_dir: ModelsDir = None,
    server: ServerOptions,
) -> None:
    """Delete the downloaded files of a model, and its computed prompts.

    Its model card stays, and so do files that exo did not download.
    """
    check_runner(runner)
    settings = server.settings(models_dir)
    catalogue = catalogue_of(settings)
    card = card_of(catalogue, model)
    store = store_of(settings)
    prefixes = _prefixes_of(settings, card) if runner in (None, "cuda") else None
    try:
        if (found := catalogue.found.get(card.model_id)) is not None:
            raise CommandError(f"{card.model_id} is in {found.program}, where exo deletes nothing; {found.removal}")
        wanted = _wanted(store, card, [runner] if runner else card.runners, quant)
    except CommandError:
        if prefixes is None:
            raise
        wanted = []
    _check_use(settings, card, {each.source.runner for each in wanted} | ({"cuda"} if prefixes else set()))
    for each in wanted:
        say(f"{each.source.runner}: {each.found.path}, {each.found.bytes:,} bytes")
    if prefixes is not None:
        say(f"cuda: {prefixes}, {size_of_prefixes(prefixes):,} bytes of computed prompts")
    if not yes and not typer.confirm("delete this?", err=True):
        raise CommandError("nothing is deleted")
    if prefixes is not None:
        shutil.rmtree(prefixes, ignore_errors=True)
    try:
        removed = [store.remove(each.source) for each in wanted]
    except PullError as error:
        raise CommandError(str(error), ExitCode.NOT_FOUND if error.code == "not_found" else ExitCode.FAILED) from error
    if removed:
        say(f"deleted {sum(len(each.files) for each in removed)} files, {sum(each.bytes for each in removed):,} bytes")


def _prefixes_of(settings: Settings, card: ModelCard) -> Path | None:
    """The folder of the model's computed prompts; None if there are none."""
    directory = settings.prefix_directory
    folder = None if directory is None else directory / folder_name(card.model_id)
    return folder if folder is not None and folder.is_dir() else None


def _wanted(store: Store, card: ModelCard, runners: Sequence[str], quant: str | None) -> list[Kept]:
    """The files to delete. Raises CommandError if there are none."""
    # A card with a path names the user's own file. The store itself spares other files that exo did not download.
    found = [each for each in kept(store, card, runners, quant) if each.source.repo is not None]
    there = [each for each in found if each.found.state != "absent"]
    # Files placed by hand have no revision, and stay; if there are no others, the store's error says so.
    wanted = [each for each in there if each.found.revision is not None] or there
    if not wanted:
        raise CommandError(f"nothing was pulled of {card.model_id} for {', '.join(runners)}", ExitCode.NOT_FOUND)
    return wanted


def _check_use(settings: Settings, card: ModelCard, runners: set[str]) -> None:
    """Raises CommandError if the configured server has the model loaded. Other servers are not asked."""
    with server_client(settings) as client:
        if not is_up(client):
            return
        try:
            instances = json.loads(ask(client, "/v1/instances"))["data"]
        except CommandError as error:
            warn(f"it is not known whether the server at {settings.url()} has the model loaded: {error}")
            return
    for each in instances:
        if each["model"] == card.model_id and each["runner"] in runners and each["pid"] is not None:
            raise CommandError(
                f"the server at {settings.url()} has {card.model_id} loaded by {each['runner']};"
                f" `exo stop {card.model_id}` unloads it"
            )
