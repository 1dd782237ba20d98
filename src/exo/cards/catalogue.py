"""The catalogue: built-in model cards and the user's own, found by exact name.

A built-in card's ``storage_size`` is that of its GGUF file when the card was written, for lists. Wherever a size
counts, as for disk space, it comes from the hub's answer.
"""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from exo.cards.card import ModelCard
from exo.cards.card_file import BrokenCard, CardFile, read_again

_BUILT_IN = Path(__file__).parent / "built_in"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every usable card, and what is wrong with the files that have a fault, which take no other file down."""

    cards: Mapping[str, ModelCard]
    """By model id, in alphabetical order."""
    aliases: Mapping[str, tuple[str, ...]]
    """Model ids by alias; an alias of several models is ambiguous and finds none of them."""
    problems: tuple[BrokenCard, ...]
    files: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """The file of each card, by model id."""
    user_directory: Path | None = None
    """Where the user's cards are; None where there are none to be read."""
    user_files: tuple[CardFile, ...] = ()
    """Every file there, as it was last read."""

    @classmethod
    def load(cls, user_directory: Path | None = None) -> "Catalogue":
        """Reads the built-in cards, then every ``*.toml`` below ``user_directory``, if there is such a directory.

        A user's card replaces the built-in card of the same model id, and takes any alias from a built-in card.
        """
        return _merged(user_directory, read_again(user_directory) if user_directory is not None else ())

    def refreshed(self) -> "Catalogue":
        """The same catalogue or, where the user's files have changed, what they say now.

        A file that cannot be used any more is a problem, and its card stays as it was. Built-in cards are part of the
        program and are not looked at again.
        """
        if self.user_directory is None:
            return self
        files = read_again(self.user_directory, self.user_files)
        return self if files == self.user_files else _merged(self.user_directory, files)

    def get(self, name: str) -> ModelCard | None:
        """The card with this model id or, failing that, this alias. Nothing merely similar is ever returned."""
        owners = self.aliases.get(name, ())
        return self.cards.get(name) or (self.cards[owners[0]] if len(owners) == 1 else None)

    def suggest(self, name: str) -> tuple[str, ...]:
        """Names for the error message about an unknown one: an ambiguous alias's models, or else near misses."""
        if owners := self.aliases.get(name):
            return owners
        known = {model_id.rpartition("/")[2].lower(): model_id for model_id in self.cards}
        known |= {known.lower(): known for known in (*self.aliases, *self.cards)}
        return tuple(dict.fromkeys(known[match] for match in difflib.get_close_matches(name.lower(), known)))


@cache
def _built_in() -> tuple[CardFile, ...]:
    return read_again(_BUILT_IN)


def _merged(user_directory: Path | None, user_files: tuple[CardFile, ...]) -> Catalogue:
    built_in, duplicates = _by_id(_built_in())
    own, own_duplicates = _by_id(user_files)
    found = built_in | own
    cards = {model_id: card for model_id in sorted(found) if (card := found[model_id].card)}
    aliases = _by_alias(cards, own.keys())
    problems = [file.problem for file in (*_built_in(), *user_files) if file.problem is not None]
    problems += [*duplicates, *own_duplicates, *_ambiguous(found, aliases)]
    files = {model_id: found[model_id].path for model_id in cards}
    return Catalogue(cards, aliases, tuple(problems), files, user_directory, user_files)


def _by_id(files: Iterable[CardFile]) -> tuple[dict[str, CardFile], list[BrokenCard]]:
    """The cards of one place by model id; of several with the same id, the first in order of file name."""
    found: dict[str, CardFile] = {}
    duplicates: list[BrokenCard] = []
    for file in files:
        if file.card is not None and (first := found.setdefault(file.card.model_id, file)) is not file:
            reason = f"{file.card.model_id} is already in {first.path}"
            duplicates.append(BrokenCard(str(file.path), "model_id", reason))
    return found, duplicates


def _by_alias(cards: Mapping[str, ModelCard], own: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Owners of each alias. A built-in card gives way where one of the user's, in ``own``, has the name."""
    owners: dict[str, tuple[str, ...]] = {}
    for model_id in sorted(cards, key=lambda model_id: model_id not in own):
        for alias in dict.fromkeys(cards[model_id].aliases):
            claimed = owners.get(alias, ())
            if model_id in own or not (alias in own or any(other in own for other in claimed)):
                owners[alias] = (*claimed, model_id)
    return owners


def _ambiguous(found: Mapping[str, CardFile], aliases: Mapping[str, tuple[str, ...]]) -> Iterator[BrokenCard]:
    """One problem for each card and alias of it that is also a name of another card."""
    for alias, owners in aliases.items():
        claims = {*owners, alias} if alias in found else set(owners)
        for owner in owners:
            if others := ", ".join(f"{other} ({found[other].path})" for other in sorted(claims - {owner})):
                yield BrokenCard(str(found[owner].path), "aliases", f"{alias} is also a name of {others}")
