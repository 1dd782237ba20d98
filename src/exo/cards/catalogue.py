"""The catalogue: built-in model cards and the user's own, looked up by exact name.

A built-in card's ``storage_size`` is that of its GGUF file when the card was written. It is for lists only: disk
space is computed from the sizes that the hub reports.
"""

import difflib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from exo.cards.card import CardError, ModelCard

log = logging.getLogger(__name__)

_BUILT_IN = Path(__file__).parent / "built_in"
_MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BrokenCard:
    """An error in a card file, to be fixed by its author. ``key`` is dotted; empty for the file as a whole."""

    file: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key}: {self.reason}" if self.key else f"{self.file}: {self.reason}"


class Stamp(NamedTuple):
    """Changes whenever a file does. ctime is the file system's own clock, which no copied date can turn back."""

    inode: int
    size: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class CardFile:
    """A card file as it was last read. With both a card and a problem, the card is the last valid one."""

    path: Path
    stamp: Stamp | None
    """None if the file cannot be read."""
    card: ModelCard | None
    problem: BrokenCard | None


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model in another program's folder. Its card has no file: it is made from the model's own files."""

    card: ModelCard
    program: str
    path: Path
    """The path that the runner loads."""
    removal: str
    """The way to delete the model, as a clause."""
    notes: tuple[str, ...] = ()
    """Settings of the other program that exo does not follow."""


@dataclass(frozen=True, slots=True)
class Found:
    """The models of other programs, and the files there that cannot be used, each with the reason."""

    models: tuple[FoundModel, ...] = ()
    unusable: tuple[str, ...] = ()


def _find_nothing() -> Found:
    return _NOTHING


_NOTHING = Found()


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every valid card, and the errors in the other files. An invalid file does not affect the others."""

    cards: Mapping[str, ModelCard]
    """By model id, in alphabetical order: first the cards that have a file, then those of found models."""
    aliases: Mapping[str, tuple[str, ...]]
    """Model ids by alias. An alias of several models is ambiguous and finds none of them."""
    problems: tuple[BrokenCard, ...]
    files: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Card files by model id."""
    user_directory: Path | None = None
    user_files: tuple[CardFile, ...] = ()
    found: Mapping[str, FoundModel] = field(default_factory=dict[str, FoundModel])
    """Models of other programs, by model id. No card file has one of these ids."""
    last_found: Found = _NOTHING
    find: Callable[[], Found] = _find_nothing
    """Looks for models of other programs; gives the same object if nothing has changed."""

    @classmethod
    def load(cls, user_directory: Path | None = None, find: Callable[[], Found] = _find_nothing) -> "Catalogue":
        """Reads the built-in cards, then every ``*.toml`` below ``user_directory``, if that exists.

        A user's card replaces the built-in card of the same model id, and takes any alias from a built-in card. The
        names of both take precedence over those of found models.
        """
        return _merge(user_directory, _read_cards(user_directory) if user_directory is not None else (), find, find())

    def refreshed(self) -> "Catalogue":
        """The catalogue after the latest changes to the user's files; ``self`` if there are none.

        A file that has become invalid is a problem, and its last valid card stays. Built-in cards are part of the
        program and are not read again.
        """
        files = _read_cards(self.user_directory, self.user_files) if self.user_directory is not None else ()
        found = self.find()
        if files == self.user_files and found is self.last_found:
            return self
        return _merge(self.user_directory, files, self.find, found)

    def get(self, name: str) -> ModelCard | None:
        """The card with this model id or, failing that, this alias. Similar names never match."""
        owners = self.aliases.get(name, ())
        return self.cards.get(name) or (self.cards[owners[0]] if len(owners) == 1 else None)

    def with_adapter(self, name: str) -> tuple[ModelCard | None, str]:
        """The card of a name that may have ":adapter" behind it, and the adapter's name; empty without one.

        A model id or alias may contain colons, and precedes one with an adapter. The card may lack that adapter, but
        not have none at all.
        """
        if (card := self.get(name)) is not None:
            return card, ""
        base, _, adapter = name.rpartition(":")
        card = self.get(base)
        return (card, adapter) if card is not None and card.adapters else (None, "")

    def unknown(self, name: str) -> str:
        """The error message about a name that finds no card."""
        meant = " or ".join(self.suggest(name))
        return f"no model card is called {name!r}{f'; did you mean {meant}?' if meant else ''}"

    def suggest(self, name: str) -> tuple[str, ...]:
        """The models that an unknown name may mean: those of an ambiguous alias, or near misses."""
        if owners := self.aliases.get(name):
            return owners
        known = {model_id.rpartition("/")[2].lower(): model_id for model_id in self.cards}
        known |= {known.lower(): known for known in (*self.aliases, *self.cards)}
        return tuple(dict.fromkeys(known[match] for match in difflib.get_close_matches(name.lower(), known)))


class LiveCatalogue:
    """A catalogue that follows its files. ``current`` checks them for changes at most once in ``every_seconds``."""

    def __init__(self, catalogue: Catalogue, every_seconds: float = 1.0) -> None:
        self.known = catalogue
        """The catalogue as of the last check."""
        self._every_seconds = every_seconds
        self._next_check = time.monotonic() + every_seconds

    def current(self) -> Catalogue:
        """The catalogue as of now. New problems are logged."""
        now = time.monotonic()
        if now >= self._next_check:
            before, self.known = self.known, self.known.refreshed()
            self._next_check = now + self._every_seconds
            if self.known is not before:
                log.info("the models have changed; there are %d now", len(self.known.cards))
                for problem in self.known.problems:
                    if problem not in before.problems:
                        log.warning("model card %s", problem)
        return self.known


def _read_cards(directory: Path, known: Iterable[CardFile] = ()) -> tuple[CardFile, ...]:
    """Every ``*.toml`` below a directory, in order of path. Files of ``known`` that have not changed are not reread.

    A folder that cannot be listed is a problem, and the known files in it stay.
    """
    before = {str(file.path): file for file in known}
    unlisted: list[OSError] = []
    # Paths stay strings until a file has changed: a server walks through all of them once a second.
    walk = os.walk(directory, onerror=unlisted.append)
    names = {os.path.join(folder, name) for folder, _, names in walk for name in names}
    files: list[CardFile] = []
    for error in unlisted:
        if not isinstance(error, FileNotFoundError):
            folder = str(error.filename)
            names.update(name for name in before if name.startswith(os.path.join(folder, "")))
            problem = BrokenCard(folder, "", f"cannot be listed: {error.strerror}")
            files.append(CardFile(Path(folder), None, None, problem))
    for name in sorted(name for name in names if name.endswith(".toml")):
        old, stamp = before.get(name), stamp_of(name)
        files.append(old if old is not None and old.stamp == stamp else _read_card(Path(name), stamp, old))
    return tuple(files)


def stamp_of(name: str | Path) -> Stamp | None:
    """The stamp of a file or folder, links followed; None if it cannot be looked at."""
    try:
        found = os.stat(name)
    except OSError:
        return None
    return Stamp(found.st_ino, found.st_size, found.st_ctime_ns)


def _read_card(path: Path, stamp: Stamp | None, old: CardFile | None) -> CardFile:
    key = ""
    try:
        if stamp is not None and stamp.size > _MAX_CARD_BYTES:
            raise CardError("", f"is larger than {_MAX_CARD_BYTES:,} bytes")
        return CardFile(path, stamp, ModelCard.from_toml(path.read_text(encoding="utf-8")), None)
    except CardError as error:
        key, reason = error.key, error.reason
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read: {error}"
    if old is None or old.card is None:
        return CardFile(path, stamp, None, BrokenCard(str(path), key, reason))
    return replace(
        old, stamp=stamp, problem=BrokenCard(str(path), key, f"{reason}; the card stays as it was before this change")
    )


@cache
def _built_in() -> tuple[CardFile, ...]:
    return _read_cards(_BUILT_IN)


def _merge(
    user_directory: Path | None, user_files: tuple[CardFile, ...], find: Callable[[], Found], found: Found
) -> Catalogue:
    built_in, duplicates = _by_id(_built_in())
    own, own_duplicates = _by_id(user_files)
    with_file = built_in | own
    cards = {model_id: card for model_id in sorted(with_file) if (card := with_file[model_id].card)}
    aliases = _by_alias(cards, own.keys())
    problems = [file.problem for file in (*_built_in(), *user_files) if file.problem is not None]
    problems += [*duplicates, *own_duplicates, *_ambiguous(with_file, aliases)]
    files = {model_id: with_file[model_id].path for model_id in cards}
    others = {each.card.model_id: each for each in found.models if each.card.model_id not in cards}
    return Catalogue(
        cards | {model_id: others[model_id].card for model_id in sorted(others)},
        aliases | _further_aliases(others.values(), {*cards, *aliases}),
        tuple(problems),
        files,
        user_directory,
        user_files,
        others,
        found,
        find,
    )


def _further_aliases(found: Iterable[FoundModel], taken: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The owners of the found models' aliases that are nothing else's name."""
    owners: dict[str, tuple[str, ...]] = {}
    for model in found:
        for alias in model.card.aliases:
            if alias not in taken:
                owners[alias] = (*owners.get(alias, ()), model.card.model_id)
    return owners


def _by_id(files: Iterable[CardFile]) -> tuple[dict[str, CardFile], list[BrokenCard]]:
    """Card files by model id. Among several with one id, the first in order of path wins; the others are problems."""
    found: dict[str, CardFile] = {}
    duplicates: list[BrokenCard] = []
    for file in files:
        if file.card is not None and (first := found.setdefault(file.card.model_id, file)) is not file:
            reason = f"{file.card.model_id} is already in {first.path}"
            duplicates.append(BrokenCard(str(file.path), "model_id", reason))
    return found, duplicates


def _by_alias(cards: Mapping[str, ModelCard], own: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The owners of each alias. A built-in card loses an alias that is a name of one of the user's cards, ``own``."""
    owners: dict[str, tuple[str, ...]] = {}
    for model_id in sorted(cards, key=lambda model_id: model_id not in own):
        for alias in dict.fromkeys(cards[model_id].aliases):
            claimed = owners.get(alias, ())
            if model_id in own or not (alias in own or any(other in own for other in claimed)):
                owners[alias] = (*claimed, model_id)
    return owners


def _ambiguous(found: Mapping[str, CardFile], aliases: Mapping[str, tuple[str, ...]]) -> Iterator[BrokenCard]:
    """A problem for each alias of a card that is also a name of another card."""
    for alias, owners in aliases.items():
        claims = {*owners, alias} if alias in found else set(owners)
        for owner in owners:
            if others := ", ".join(f"{other} ({found[other].path})" for other in sorted(claims - {owner})):
                yield BrokenCard(str(found[owner].path), "aliases", f"{alias} is also a name of {others}")
