"""Card files in a directory: each read once, and again when it has changed."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from exo.cards.card import CardError, ModelCard

_LARGEST = 1 << 20
"""Bytes of a card file."""


@dataclass(frozen=True, slots=True)
class BrokenCard:
    """Something in a card file that its author should mend; ``key`` is dotted, and empty for the file as a whole."""

    file: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key}: {self.reason}" if self.key else f"{self.file}: {self.reason}"


class Stamp(NamedTuple):
    """What changes when a file does, however it is written."""

    inode: int
    size: int
    changed_ns: int
    """Of content or name, by the file system's own clock, so that no date that a copy keeps hides a change."""


@dataclass(frozen=True, slots=True)
class CardFile:
    """A card file as it was last read. A card and a problem together: the card is the last that could be used."""

    path: Path
    stamp: Stamp | None
    """None where there is nothing that can be read."""
    card: ModelCard | None
    problem: BrokenCard | None


def read_again(directory: Path, known: Iterable[CardFile] = ()) -> tuple[CardFile, ...]:
    """Every ``*.toml`` below a directory, in order of path; those of ``known`` that have not changed are not read."""
    before = {str(file.path): file for file in known}
    files: list[CardFile] = []
    for name in sorted(_names(directory)):
        old, stamp = before.get(name), _stamp(name)
        files.append(old if old is not None and old.stamp == stamp else _read(Path(name), stamp, old))
    return tuple(files)


def _names(directory: Path) -> Iterator[str]:
    """As strings: a server goes through all of them again and again."""
    for folder, _, names in os.walk(directory):
        yield from (os.path.join(folder, name) for name in names if name.endswith(".toml"))


def _stamp(name: str) -> Stamp | None:
    try:
        found = os.stat(name)
    except OSError:
        return None
    return Stamp(found.st_ino, found.st_size, found.st_ctime_ns)


def _read(path: Path, stamp: Stamp | None, old: CardFile | None) -> CardFile:
    key = ""
    try:
        if stamp is not None and stamp.size > _LARGEST:
            raise CardError("", f"is larger than {_LARGEST:,} bytes")
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
