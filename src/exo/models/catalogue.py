"""The catalogue: built-in model cards and the user's own, found by exact name."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from exo.models.card import CardError, ModelCard


@dataclass(frozen=True, slots=True)
class BrokenCard:
    """Something in a card file that its author should mend; ``key`` is dotted, and empty for the file as a whole."""

    file: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every usable card, and what is wrong with the files that have a fault, which take no other file down."""

    cards: Mapping[str, ModelCard]
    """By model id, in alphabetical order."""
    aliases: Mapping[str, tuple[str, ...]]
    """Model ids by alias; an alias of several models is ambiguous and finds none of them."""
    problems: tuple[BrokenCard, ...]

    @classmethod
    def load(cls, user_directory: Path | None = None) -> "Catalogue":
        """Reads the built-in cards, then every ``*.toml`` below ``user_directory``, if there is such a directory.

        A user's card replaces the built-in card of the same model id.
        """
        built_in = files("exo.models").joinpath("cards").iterdir()
        problems: list[BrokenCard] = []
        found = _read((entry for entry in built_in if entry.name.endswith(".toml")), problems)
        if user_directory is not None:
            found |= _read(user_directory.rglob("*.toml"), problems)
        cards = {model_id: found[model_id].card for model_id in sorted(found)}
        aliases = _by_alias(cards)
        problems.extend(_ambiguous(found, aliases))
        return cls(cards, aliases, tuple(problems))

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


@dataclass(frozen=True, slots=True)
class _Found:
    file: str
    card: ModelCard


def _read(entries: Iterable[Traversable], problems: list[BrokenCard]) -> dict[str, _Found]:
    """The cards of one place by model id; of several with the same id, the first in order of file name."""
    found: dict[str, _Found] = {}
    for entry in sorted(entries, key=str):
        file = str(entry)
        try:
            card = ModelCard.from_toml(entry.read_text(encoding="utf-8"))
        except CardError as error:
            problems.append(BrokenCard(file, error.key, error.reason))
        except (OSError, UnicodeDecodeError) as error:
            problems.append(BrokenCard(file, "", f"cannot be read: {error}"))
        else:
            first = found.setdefault(card.model_id, _Found(file, card))
            if first.file != file:
                problems.append(BrokenCard(file, "model_id", f"{card.model_id} is already in {first.file}"))
    return found


def _by_alias(cards: Mapping[str, ModelCard]) -> dict[str, tuple[str, ...]]:
    owners: dict[str, tuple[str, ...]] = {}
    for card in cards.values():
        for alias in dict.fromkeys(card.aliases):
            owners[alias] = (*owners.get(alias, ()), card.model_id)
    return owners


def _ambiguous(found: Mapping[str, _Found], aliases: Mapping[str, tuple[str, ...]]) -> Iterable[BrokenCard]:
    """One problem for each card and alias of it that is also a name of another card."""
    for alias, owners in aliases.items():
        claims = {*owners, alias} if alias in found else set(owners)
        for owner in owners:
            if others := ", ".join(sorted(claims - {owner})):
                yield BrokenCard(found[owner].file, "aliases", f"{alias} is also a name of {others}")
