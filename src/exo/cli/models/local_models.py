"""The models that have a model card on this machine, and their files on disk."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue, FoundModel
from exo.cli.console import warn
from exo.config import Settings
from exo.exit_code import CommandError, ExitCode
from exo.store.errors import PullError
from exo.store.file_selection import Source
from exo.store.found.finder import Finder
from exo.store.store import OnDisk, Store
from exo.worker.protocol.runners import RUNNERS


class FileState(BaseModel):
    """A model's files, as ``--json`` prints them. Sizes are bytes."""

    model_config = ConfigDict(frozen=True)

    source: str | None = None
    """The repository with the GGUF file or pattern, or the path; and the projector."""
    state: str | None = None
    """present, partial or absent. None if the model card's table for the runner is broken."""
    bytes: int = 0
    total: int | None = None
    """The size of the whole, if it is known."""
    path: str | None = None
    """The path that the runner loads, or of a part of it."""
    revision: str | None = None
    read_only: bool = False

    @classmethod
    def of(cls, source: Source, found: OnDisk) -> Self:
        files = source.path or source.file, source.mmproj
        return cls(
            source=": ".join(filter(None, (source.repo, " and ".join(filter(None, files))))) or None,
            state=found.state,
            bytes=found.bytes,
            total=found.total,
            path=str(found.path) if found.path is not None else None,
            revision=found.revision,
            read_only=found.read_only,
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """The files on disk of one model for one runner."""

    source: Source
    found: OnDisk


def catalogue_of(settings: Settings, own: Sequence[FoundModel] = ()) -> Catalogue:
    """The catalogue, with models that the user has named by their paths, if any.

    Prints the problems of single model cards and of models directories on standard error.
    """
    catalogue = Catalogue.load(settings.cards_directory, Finder(settings.other_folders, own))
    for problem in catalogue.problems:
        warn(f"model card {problem}")
    for directory in settings.models_directories:
        try:
            os.listdir(directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            warn(f"models directory {directory}: cannot be listed: {error.strerror}")
    return catalogue


def card_of(catalogue: Catalogue, name: str) -> ModelCard:
    """The model card with an id or alias. Raises CommandError, which suggests similar names."""
    card = catalogue.get(name)
    if card is None:
        raise CommandError(catalogue.unknown(name), ExitCode.NOT_FOUND)
    return card


def store_of(settings: Settings) -> Store:
    return Store(settings.models_directories, settings.read_only_directories)


def size_of_prefixes(folder: Path | None) -> int:
    """The bytes that computed prefixes of prompts take in a folder; 0 if it is not there."""
    size = 0
    for path in folder.rglob("*") if folder is not None else ():
        with suppress(OSError):  # a runner may delete it
            size += path.stat().st_size if path.is_file() else 0
    return size


def check_runner(runner: str | None) -> None:
    """Raises CommandError if ``--runner`` names no runner."""
    if runner is not None and runner not in RUNNERS:
        message = f"--runner: there is no runner {runner!r}; there are {', '.join(RUNNERS)}"
        raise CommandError(message, ExitCode.USAGE)


def kept(store: Store, card: ModelCard, runners: Iterable[str], quant: str | None = None) -> Iterator[Kept]:
    """The files for each runner whose table in the card is valid."""
    for runner in runners:
        try:
            source = Source.of(card, runner, quant)
        except PullError:
            continue  # the runner itself reports the error
        yield Kept(source, store.on_disk(source))
