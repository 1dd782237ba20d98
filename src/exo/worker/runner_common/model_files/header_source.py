"""The beginning of a model file, read as far as its header goes: from a disk, or from a hub by range requests."""

from pathlib import Path
from typing import Protocol

_FIRST_READ = 1 << 16


class HeaderError(Exception):
    """A model file is not sound. The message continues a sentence whose subject is the file."""


class HeaderSource(Protocol):
    """A file whose first bytes are fetched when they are needed."""

    @property
    def size(self) -> int:
        """The length of the whole file in bytes."""
        ...

    def upto(self, end: int) -> bytes | bytearray:
        """At least the first ``end`` bytes; fewer only if the file has shrunk. ``end`` is at most ``size``."""
        ...


class LocalHeader:
    """A file on disk. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = bytearray()
        self.size = path.stat().st_size

    def upto(self, end: int) -> bytearray:
        """See ``HeaderSource``. The file is read, not mapped: a mapped file that shrinks ends its reader's process."""
        if (have := len(self._data)) < end:
            with self._path.open("rb") as file:
                file.seek(have)
                self._data += file.read(max(end, _FIRST_READ, 2 * have) - have)
        return self._data


def first_bytes(source: HeaderSource, end: int, limit: int, what: str) -> bytes | bytearray:
    """At least the first ``end`` bytes, which ``what`` claims to reach to. Raises HeaderError."""
    size = source.size
    if end <= size:
        if end > limit:
            raise HeaderError(f"has a header of more than {limit >> 20} MiB")
        data = source.upto(end)
        if len(data) >= end:
            return data
        size = len(data)
    raise HeaderError(f"ends within its header, at byte {size}, in {what}; download it again")
