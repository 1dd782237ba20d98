"""A saved prefix as a file of raw bytes: head, token ids, state of the slot, checkpoints, SHA-256 digests.

    magic, length of the JSON (4 bytes, little-endian), JSON: ``PrefixHead``
    token ids (int32), cells of the slot, state of each checkpoint
    a digest of each ``PIECE`` bytes of each of these parts, the one with the JSON first

llama.cpp trusts a state that it is given, and bad lengths in one can end the process. Therefore every length is checked
against the file's size, and every byte against its digest, before the state is used.
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from exo.worker.runner_cuda.prefix.state import new_state

MAGIC = b"exo prefix 1\n"
PIECE = 16 << 20
"""Pieces are hashed in parallel: one thread of an older CPU hashes 0.4 GB/s, and a state may have 3 GB."""
_READERS = 4
_LONGEST_HEAD = 1 << 20
_DIGEST = 32
_NICE = 10

Bytes = npt.NDArray[np.uint8]
Length = Annotated[int, Field(ge=0, lt=1 << 48)]


class DamagedError(Exception):
    """A file does not have the expected content. The message is a predicate of the file."""


class GivenUpError(Exception):
    """Nobody waits for the file any more."""


class CheckpointHead(BaseModel):
    """A checkpoint of the first ``length`` tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    length: Length
    least: Length
    size: Length


class PrefixHead(BaseModel):
    """The content of a file, apart from the numbers themselves. Sizes are in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    key: Mapping[str, JsonValue]
    """The model and every setting that the state depends on."""
    adapter: str = ""
    """The key of the adapters that it was computed with; empty if there were none."""
    n_tokens: Length
    least: Length
    """See ``host_tier.Saved``."""
    size: Length
    seconds: float = Field(ge=0, allow_inf_nan=False)
    """The estimated time to compute these tokens."""
    checkpoints: tuple[CheckpointHead, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        inside = (each.least <= each.length <= self.n_tokens for each in self.checkpoints)
        if not self.n_tokens or self.least > self.n_tokens or not all(inside):
            raise ValueError("a length is outside the prefix")
        return self

    @property
    def sizes(self) -> list[int]:
        """The sizes of the parts after the JSON."""
        return [4 * self.n_tokens, self.size, *(each.size for each in self.checkpoints)]

    def reach(self, common: int) -> int:
        """Returns how many of the first ``common`` tokens can be used."""
        if common >= self.least:
            return common
        return max((min(common, each.length) for each in self.checkpoints if each.least <= common), default=0)


def write(path: Path, head: PrefixHead, parts: Sequence[Bytes]) -> None:
    """Creates a file that only its owner may read. It is not synced: digests show what a power failure has lost.

    Raises OSError.
    """
    text = head.model_dump_json(exclude_defaults=True).encode()
    first = MAGIC + len(text).to_bytes(4, "little") + text
    digests: list[bytes] = []
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with FileIO(os.open(path, flags, 0o600), "wb") as file:
        for part in (np.frombuffer(first, np.uint8), *parts):
            for piece in _pieces(part):
                digests.append(hashlib.sha256(piece.data).digest())
                _write_all(file.fileno(), piece)
        _write_all(file.fileno(), np.frombuffer(b"".join(digests), np.uint8))


def read_head(path: Path) -> tuple[PrefixHead, npt.NDArray[np.int32]]:
    """Returns the head and the token ids, whose digests are not checked yet. Raises DamagedError and OSError."""
    with _opened(path) as file:
        head, at = _head(file.fileno())
        tokens = np.empty(head.sizes[0], np.uint8)
        _read_all(file.fileno(), tokens, at)
        return head, tokens.view(np.int32)


def read(path: Path, expected: PrefixHead, given_up: threading.Event) -> list[Bytes]:
    """Returns the parts after the JSON, verified. Raises DamagedError, GivenUpError and OSError."""
    with _opened(path) as file, ThreadPoolExecutor(_READERS, initializer=be_nice) as readers:
        number = file.fileno()
        head, at = _head(number)
        if head != expected:
            raise DamagedError("has changed")
        parts = [new_state(size) for size in (at, *head.sizes)]
        pieces = [piece for part in parts for piece in _pieces(part)]
        starts = [0, *np.cumsum([piece.size for piece in pieces]).tolist()]

        def digest(piece: Bytes, start: int) -> bytes:
            if given_up.is_set():
                raise GivenUpError
            _read_all(number, piece, start)
            return hashlib.sha256(piece.data).digest()

        digests = b"".join(readers.map(digest, pieces, starts))
        stored = np.empty(len(digests), np.uint8)
        _read_all(number, stored, starts[-1])
        if digests != stored.tobytes():
            raise DamagedError("does not have the content that was written")
        return parts[1:]


def be_nice() -> None:
    """Has the calling thread give way to threads that compute. On Linux, priorities are those of threads."""
    if hasattr(os, "sched_getaffinity"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _opened(path: Path) -> FileIO:
    return FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")


def _head(number: int) -> tuple[PrefixHead, int]:
    """Returns the head and the offset of the part after it. Raises DamagedError and OSError."""
    start = np.empty(len(MAGIC) + 4, np.uint8)
    size = os.fstat(number).st_size
    if size < start.size:
        raise DamagedError("is too short")
    _read_all(number, start, 0)
    magic, length = start.tobytes()[:-4], int.from_bytes(start.tobytes()[-4:], "little")
    if magic != MAGIC or length > min(_LONGEST_HEAD, size - start.size):
        raise DamagedError("is no saved prefix")
    text = np.empty(length, np.uint8)
    _read_all(number, text, start.size)
    try:
        head = PrefixHead.model_validate_json(text.tobytes())
    except ValidationError as error:
        raise DamagedError("has a damaged head") from error
    at = start.size + length
    n_pieces = sum(-(-each // PIECE) for each in (at, *head.sizes))
    if size != at + sum(head.sizes) + n_pieces * _DIGEST:
        raise DamagedError(f"has {size} bytes, which is not the size in its head")
    return head, at


def _pieces(part: Bytes) -> Iterator[Bytes]:
    return (part[at : at + PIECE] for at in range(0, part.size, PIECE))


def _write_all(number: int, data: Bytes) -> None:
    left = data.data
    while left:
        left = left[os.write(number, left) :]


def _read_all(number: int, target: Bytes, at: int) -> None:
    """Fills ``target`` from the offset ``at``. Raises DamagedError and OSError."""
    left = target.data
    while left:
        n_read = os.preadv(number, [left], at)
        if not n_read:
            raise DamagedError("has been truncated")
        left, at = left[n_read:], at + n_read
