"""The model that a command line names: a model card, a repository on the hub, or a path.

A repository gets a model card and is downloaded; a path gets a model card in memory.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue, FoundModel
from exo.cli.console import err
from exo.cli.models.local_models import card_of, store_of
from exo.config import Settings
from exo.exit_code import CommandError, ExitCode
from exo.store.discover.hub_reference import HubReference
from exo.store.found.finder import Finder, model_at
from exo.store.found.unread_model import UnusableError
from exo.store.local import is_on_disk
from exo.worker.protocol.runners import RUNNERS
from exo.worker.router import parse_model

_NOTICED_SECONDS = 20.0
"""How long a server may take to notice a new model. It looks every few seconds."""


@dataclass(frozen=True, slots=True)
class NamedModel:
    """The name for requests, and the model itself if it has been named by its path."""

    name: str
    own: tuple[FoundModel, ...] = ()


def named_model(settings: Settings, text: str) -> NamedModel:
    """The model of a command that starts a server. Downloads it if need be. Raises CommandError."""
    wish = parse_model(text)
    name, runner = (wish.name, wish.runner) if wish.runner in RUNNERS else (text, None)
    reference, path = HubReference.with_prefix(name), _path(name)
    if reference is None and path is None:
        return NamedModel(text)
    catalogue = Catalogue.load(settings.cards_directory, Finder(settings.other_folders))
    if catalogue.get(name) is not None:
        return NamedModel(text)
    if reference is not None:
        model_id, own_runner = _downloaded(settings, catalogue, reference, runner)
        return NamedModel(_with_runner(model_id, runner or own_runner))
    assert path is not None
    try:
        model = model_at(path)
    except UnusableError as error:
        raise CommandError(str(error), ExitCode.NOT_FOUND) from error
    if (taken := catalogue.cards.get(model.card.model_id)) is not None:
        raise CommandError(f"{path}: there is already a model {taken.model_id}; use that, or rename the file")
    return NamedModel(_with_runner(model.card.model_id, runner), (model,))


def requested_model(settings: Settings, text: str) -> NamedModel:
    """The same for a command that asks the running server if there is one: waits until it has noticed a new model."""
    model = named_model(settings, text)
    if model == NamedModel(text):
        return model
    from exo.cli.server.http_client import ask, is_up, server_client  # a command that starts a server has no use for it

    with server_client(settings) as client:
        if not is_up(client):
            return model
        if model.own:
            raise CommandError(
                f"{text}: the server at {settings.url()} is running, and a path is for a server that starts; start it"
                f" with --load {text}, or name a model that it lists"
            )
        deadline = time.monotonic() + _NOTICED_SECONDS
        while True:
            try:
                ask(client, f"/v1/models/{parse_model(model.name).name}")
            except CommandError as error:
                if error.code != ExitCode.NOT_FOUND or time.monotonic() > deadline:
                    raise
            else:
                return model
            time.sleep(0.2)


def card_of_reference(settings: Settings, catalogue: Catalogue, reference: HubReference) -> ModelCard:
    """The model card of a repository, which is written if there is none. Raises CommandError."""
    from exo.cli.models.add import add_model  # imports the hub's library, which takes a tenth of a second

    known = reference.known(catalogue)
    if known:
        return known[0].card
    taken = reference.repo in catalogue.cards and reference.quant is not None
    name = f"{reference.repo}:{reference.quant.upper()}" if taken and reference.quant is not None else None
    added = add_model(settings, catalogue, str(reference), name)
    err.print(f"{added.model_id}: model card written to {added.card}", highlight=False, markup=False, soft_wrap=True)
    return card_of(catalogue.refreshed(), added.model_id)


def _downloaded(
    settings: Settings, catalogue: Catalogue, reference: HubReference, runner: str | None
) -> tuple[str, str | None]:
    """The model id of a repository that is on disk afterwards, and the runner that it is for if not for all."""
    from exo.cli.models.pull import pull_model

    store = store_of(settings)
    for known in reference.known(catalogue):
        if is_on_disk(known.card, store, runner or known.runner):
            return known.card.model_id, known.runner
    card = card_of_reference(settings, catalogue, reference)
    own = next((known.runner for known in reference.known(catalogue) if known.card == card), None)
    pull_model(settings, card, runner or own, None)
    return card.model_id, own


def _path(text: str) -> Path | None:
    """The path that a text is by its form, whether there is something or not; None for a name."""
    if not (text.startswith(("/", "./", "../", "~")) or text in (".", "..") or text.lower().endswith(".gguf")):
        return None
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise CommandError(f"{text}: {error}", ExitCode.USAGE) from error


def _with_runner(name: str, runner: str | None) -> str:
    return f"{name}@{runner}" if runner is not None else name
