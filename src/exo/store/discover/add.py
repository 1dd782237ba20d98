"""Adding a model: a card made from what a repository on the hub says of itself, without fetching its weights."""

import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from exo.cards.card import Alias, ModelCard, ModelId
from exo.cards.catalogue import Catalogue
from exo.store.discover.hub_reference import HubReference
from exo.store.discover.inspection import inspect
from exo.store.discover.new_card import new_card
from exo.store.folder import folder_name
from exo.store.hub import Hub
from exo.store.sharing import make_directory, share

_MODEL_ID: TypeAdapter[str] = TypeAdapter(ModelId)
_ALIAS: TypeAdapter[str] = TypeAdapter(Alias)


class AddError(Exception):
    """No card was written; the message says why, and what to do."""


class Added(BaseModel):
    """The card that was written, and what it was made from."""

    model_config = ConfigDict(frozen=True)

    model_id: str
    aliases: tuple[str, ...]
    card: Path
    """The file."""
    runners: tuple[str, ...]
    """Runners that the model card has a table for."""
    repo: str
    revision: str
    """The commit that was looked at."""
    files: tuple[str, ...]
    """Files that a pull will fetch."""
    bytes: int
    """The size of all files."""
    quantization: str
    architecture: str
    n_layers: int
    context_length: int
    """Tokens that the model was trained for; 0 where unknown."""
    tasks: tuple[str, ...]
    chat_template: bool
    notes: tuple[str, ...]
    """Decisions made for the user, and features that the model lacks."""


def add(
    reference: str, hub: Hub, catalogue: Catalogue, directory: Path, *, name: str | None = None, overwrite: bool = False
) -> Added:
    """Writes a card into ``directory`` for a ``HubReference``. Blocks while it asks the hub.

    ``name`` is the card's model id where it is not to be the repository's. Raises AddError and PullError.
    """
    wanted = HubReference.parse(reference)
    if wanted is None:
        raise AddError(f"{reference!r} names no repository: expected OWNER/NAME or OWNER/NAME:QUANT")
    model_id = _checked(name or wanted.repo)
    path = _target(model_id, catalogue, directory, overwrite=overwrite)
    listing = hub.listing(wanted.repo)
    found = inspect(listing, hub, wanted.quant)
    card = new_card(
        model_id, found.description, found.tables, found.backends, found.bytes, aliases=_aliases(model_id, catalogue)
    )
    _write(path, card)
    return Added(
        model_id=model_id,
        aliases=card.aliases,
        card=path,
        runners=tuple(found.tables),
        repo=listing.repo,
        revision=listing.revision,
        files=found.files,
        bytes=found.bytes,
        quantization=found.description.quantization,
        architecture=found.description.architecture,
        n_layers=found.description.n_layers,
        context_length=found.description.context_length,
        tasks=card.tasks,
        chat_template=found.description.chat_template is not None,
        notes=found.notes,
    )


def as_text(added: Added) -> Iterator[str]:
    """Describes the model and the model card that was written, line by line."""
    context = f"{added.context_length:,} tokens of context" if added.context_length else "context not stated"
    template = "has a chat template" if added.chat_template else "has no chat template"
    yield f"{added.model_id}: {added.architecture}, {added.n_layers} layers, {context}, {template}"
    tasks, runners = ", ".join(added.tasks), " or ".join(added.runners)
    yield f"{added.quantization or 'weights'}, {added.bytes / 1e9:.2f} GB, {tasks} by {runners}"
    yield from added.notes
    yield f"written to {added.card}; fetch the model with: exo pull {(added.aliases or (added.model_id,))[0]}"


def _checked(name: str) -> str:
    try:
        return _MODEL_ID.validate_python(name)
    except ValidationError:
        raise AddError(
            f"{name!r} cannot be a model id: expected letters, digits, '.', '_' and '-', with '/' between"
        ) from None


def _target(model_id: str, catalogue: Catalogue, directory: Path, *, overwrite: bool) -> Path:
    """The file to write. One that is overwritten keeps its name, or there would be two cards of one id."""
    known, fresh = catalogue.files.get(model_id), directory / f"{folder_name(model_id)}.toml"
    taken = known or (fresh if os.path.lexists(fresh) else None)
    if taken is not None and not overwrite:
        raise AddError(f"{model_id} has a card already, {taken}; replace it with --overwrite, or give another --name")
    return known if known is not None and known.is_relative_to(directory) else fresh


def _aliases(model_id: str, catalogue: Catalogue) -> tuple[str, ...]:
    """The name without its owner, unless it is another card's."""
    alias = model_id.rpartition("/")[2].lower().removesuffix("-gguf")
    owners = {*catalogue.aliases.get(alias, ()), *([alias] if alias in catalogue.cards else [])}
    try:
        return () if owners - {model_id} or alias == model_id else (_ALIAS.validate_python(alias),)
    except ValidationError:
        return ()


def _write(path: Path, card: ModelCard) -> None:
    """The file is there as a whole or not at all: a server may read it at any moment."""
    text = card.to_toml()
    assert ModelCard.from_toml(text) == card
    fresh = path.with_name(f".{path.name}.new")
    try:
        make_directory(path.parent)
        fresh.write_text(text, encoding="utf-8")
        share(fresh, path.parent)
        fresh.replace(path)
    except OSError as error:
        raise AddError(f"{path} cannot be written: {error.strerror or error}") from error
