"""Reads folders and small files of other programs, and can tell whether anything has changed since."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from exo.cards.catalogue import Stamp, stamp_of

_MOST_FOLDERS = 20_000
"""Folders in one look. A link that leads to a whole file system would otherwise never end."""


class Look:
    """One look. Everything that it lists or reads has a stamp, and a later look is needed once one differs."""

    def __init__(self) -> None:
        self._stamps: dict[Path, Stamp | None] = {}

    def unchanged(self) -> bool:
        """Whether another look would find the same."""
        return all(stamp_of(path) == stamp for path, stamp in self._stamps.items())

    def names(self, folder: Path) -> list[str]:
        """The names in a folder, in order; none if it is not there. Raises OSError."""
        self._stamps.setdefault(folder, stamp_of(folder))
        try:
            return sorted(os.listdir(folder)) if len(self._stamps) < _MOST_FOLDERS else []
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, path: Path) -> int | None:
        """The size of a file in bytes, links followed; None if there is no regular file."""
        try:
            found = path.stat()
        except OSError:
            self._stamps[path] = None
            return None
        self._stamps[path] = Stamp(found.st_ino, found.st_size, found.st_ctime_ns)
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read(self, path: Path, limit: int) -> bytes:
        """A small file. Raises OSError, and ValueError for one that is no regular file or has more bytes."""
        size = self.size(path)
        if size is None:
            path.stat()  # raises the reason
            raise ValueError("is not a regular file")
        if size > limit:
            raise ValueError(f"has {size:,} bytes, expected at most {limit:,}")
        with path.open("rb") as file:
            return file.read(limit)

    def walk(self, root: Path, depth: int) -> Iterator[tuple[Path, list[str] | OSError]]:
        """Each folder down to ``depth`` below ``root`` and the names of the files in it.

        Links are followed, and a folder that is reached twice is given once. A folder that cannot be listed has the
        error in place of names.
        """
        seen: set[tuple[int, int]] = set()
        waiting = [(root, 0)]
        while waiting:
            folder, level = waiting.pop()
            try:
                state = folder.stat()
                if (state.st_dev, state.st_ino) in seen:
                    continue
                seen.add((state.st_dev, state.st_ino))
                names = self.names(folder)
            except (FileNotFoundError, NotADirectoryError):
                self._stamps[folder] = None
                continue
            except OSError as error:
                self._stamps[folder] = stamp_of(folder)
                yield folder, error
                continue
            folders = {name for name in names if not name.startswith(".") and (folder / name).is_dir()}
            yield folder, [name for name in names if name not in folders]
            if level < depth:
                waiting += [(folder / name, level + 1) for name in sorted(folders, reverse=True)]
