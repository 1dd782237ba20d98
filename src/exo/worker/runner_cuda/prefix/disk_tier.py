"""Saved prefixes on disk, which survive the runner: for the next one, for a replay, and for a later server.

    <directory>/<model>/<digest of the key>/<digest of the token ids>.prefix

Several runners and servers may share the directory. A file appears and is replaced whole, and any of them may delete
it at any time. Threads of this module write and read; the engine's thread only looks names up.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Tokens
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from pydantic import JsonValue

from exo.worker.runner_cuda.prefix import state_file
from exo.worker.runner_cuda.prefix.host_tier import Checkpoint, Packed, Saved, common_length, packed
from exo.worker.runner_cuda.prefix.state_file import CheckpointHead, DamagedError, GivenUpError, PrefixHead

WORTH_WRITING = 1024
"""The fewest tokens of a prefix that is written. Shorter ones are computed fast, and are mostly no agent's."""
GROWTH = 1 / 8
"""The share by which a conversation must have grown since it was written. A state is written whole each time, because
only llama.cpp knows its layout: written at every turn, 100 turns would write 50 times the last state, and so it is at
most nine times. A crash costs that share; a runner that is shut down writes the rest."""
LAST_GROWTH = 32
"""The fewest new tokens for which a runner that is shut down writes a state."""
WORTH_READING = 256
"""The fewest tokens that a file must have beyond what the slots and RAM have."""
LIMIT, LIMIT_SHARE = 8 << 30, 1 / 10
"""The size of all files together, in bytes, and the share of the free disk, unless the model card says a size."""
FIRST_RATE = 0.5e9
"""The speed at which files are read and verified, in bytes a second, before it is measured."""
LEAST_PATIENCE = 3.0
"""The least time, in seconds, for which a request waits for a file. Otherwise it is the time that computing takes."""
_TELLING = 16 << 20
"""The bytes from which the time to read a file says something about the disk."""
_REMEMBERED = 32
"""The number of prefixes that this runner does not write again, even if another model's have replaced them."""
_SUFFIX = ".prefix"
_STALE_SECONDS = 3600
"""The age at which an unfinished file is deleted: its writer has died."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredPrefix:
    """A file whose head fits this model. The rest is not verified yet."""

    path: Path
    head: PrefixHead
    tokens: Packed

    @property
    def n_bytes(self) -> int:
        """The bytes of RAM that its content takes."""
        return sum(self.head.sizes) + 40 * self.head.n_tokens

    def reach(self, tokens: Packed, adapter: str) -> int:
        """Returns how many of the first ``tokens`` can be used with an adapter."""
        return self.head.reach(common_length(self.tokens, tokens)) if adapter == self.head.adapter else 0


@dataclass(slots=True, eq=False)
class FileReading:
    """A file that is being read. ``result`` has its content; None if it is of no use any more."""

    stored: StoredPrefix
    until: float
    """On the monotonic clock."""
    result: Future[tuple[Saved, list[Checkpoint]] | None] = field(init=False)
    given_up: threading.Event = field(default_factory=threading.Event)

    def is_over(self) -> bool:
        """Whether to wait no longer. A read that takes too long is given up."""
        if time.monotonic() > self.until:
            self.given_up.set()
        return self.result.done() or self.given_up.is_set()

    def content(self) -> tuple[Saved, list[Checkpoint]] | None:
        """Returns what the file has; None if the read has failed or takes too long."""
        return self.result.result() if self.result.done() else None


@final
class DiskTier:
    """The prefixes of one model with one set of settings and any adapter, in a directory that all models share.

    At most one prefix is being written at a time, and one read.
    """

    def __init__(
        self,
        directory: Path,
        model: str,
        key: Mapping[str, JsonValue],
        limit: int | None,
        seconds_of: Callable[[int], float],
    ) -> None:
        """``key`` has the model and every setting that a state depends on.

        ``limit`` is the size of all files of all models, in bytes; None takes the default. ``seconds_of`` returns the
        time to compute some prompt tokens.
        """
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self._directory = directory
        self._folder = directory / model.replace("/", "--") / digest
        self._key = dict(key)
        self._limit = limit
        self._seconds_of = seconds_of
        self._index: dict[str, StoredPrefix] = {}  # by name
        self._changed = -1  # when the folder had changed before it was listed
        self._rate = FIRST_RATE
        self._writer = ThreadPoolExecutor(1, "prefix-writer", state_file.be_nice)
        self._reader = ThreadPoolExecutor(1, "prefix-reader")
        self._write: Future[None] | None = None
        self._failed = not self._is_own()
        if self._failed:
            _say(f"prefixes are not kept on disk: {directory} cannot be read or belongs to another user")
        self._tried: deque[tuple[Packed, str]] = deque(maxlen=_REMEMBERED)

    @property
    def n_bytes(self) -> int:
        """The bytes of this model's files."""
        return sum(sum(each.head.sizes) for each in tuple(self._index.values()))

    @property
    def is_writing(self) -> bool:
        """Whether a state that was given to ``write`` is still needed."""
        return self._write is not None and not self._write.done()

    def is_due(self, tokens: Tokens[int], adapter: str, *, last: bool = False) -> bool:
        """Whether a prefix is to be written; ``last`` says that there is no later occasion."""
        if self._failed or len(tokens) < WORTH_WRITING:
            return False
        wanted = packed(tokens)
        # A prefix that has been evicted is not written again, or two models could evict each other's for ever.
        reaches = [each.reach(wanted, adapter) for each in self._known()]
        reaches += [common_length(tokens, wanted) for tokens, computed_with in self._tried if computed_with == adapter]
        stored = max(reaches, default=0)
        return len(tokens) - stored >= (LAST_GROWTH if last else max(WORTH_READING, GROWTH * stored))

    def write(self, saved: Saved, checkpoints: list[Checkpoint]) -> None:
        """Has a prefix written. Only while none ``is_writing``."""
        tokens = packed(saved.cached)
        self._tried.append((tokens, saved.adapter))
        heads = [CheckpointHead(length=len(c.tokens), least=c.least, size=c.state.nbytes) for c in checkpoints]
        size, length = saved.state.nbytes, len(saved.cached)
        seconds = self._seconds_of(length)
        head = PrefixHead(
            key=self._key,
            adapter=saved.adapter,
            n_tokens=length,
            least=saved.least,
            size=size,
            seconds=seconds,
            checkpoints=tuple(heads),
        )
        states = [saved.state, *(each.state for each in checkpoints)]

        def work() -> None:
            try:
                self._write_file(head, tokens, states)
            except OSError as error:
                self._failed = True
                _say(f"prefixes are not kept on disk any more: {self._folder} cannot be written: {error.strerror}")

        self._write = self._writer.submit(work)

    def wait(self, until: float) -> bool:
        """Waits for the end of a write, until a time on the monotonic clock. Returns whether it has ended."""
        if self._write is not None:
            wait([self._write], max(0.0, until - time.monotonic()))
        return not self.is_writing

    def longest(self, tokens: Tokens[int], adapter: str, most: int) -> tuple[int, StoredPrefix | None]:
        """Returns the length of the longest prefix in a file that takes at most ``most`` bytes of RAM, and the file."""
        if len(tokens) < WORTH_READING:
            return 0, None
        wanted = packed(tokens)
        found = ((each.reach(wanted, adapter), each) for each in self._known() if each.n_bytes <= most)
        return max(found, key=lambda each: each[0], default=(0, None))

    def is_worth(self, stored: StoredPrefix, n_tokens: int) -> bool:
        """Whether reading a file is expected to be faster than computing ``n_tokens`` of it."""
        computing = stored.head.seconds * n_tokens / stored.head.n_tokens
        return n_tokens >= WORTH_READING and computing > stored.n_bytes / self._rate

    def read(self, stored: StoredPrefix) -> FileReading:
        """Begins to read and verify a file."""
        reading = FileReading(stored, time.monotonic() + max(LEAST_PATIENCE, stored.head.seconds))
        reading.result = self._reader.submit(self._read_file, reading)
        return reading

    def _known(self) -> list[StoredPrefix]:
        """Returns the files of this model. Other processes write and delete some, which the folder's time shows."""
        if self._failed and not self._is_own():
            return []
        try:
            changed = self._folder.stat().st_mtime_ns
            if changed != self._changed:
                names = {name for name in os.listdir(self._folder) if name.endswith(_SUFFIX)}
                self._index = {name: each for name, each in self._index.items() if name in names}
                for name in names - self._index.keys():
                    self._add(self._folder / name)
                self._changed = changed
        except OSError:  # nothing has been written yet
            self._index = {}
        return list(self._index.values())

    def _is_own(self) -> bool:
        """Whether no other user can put files there. A directory of a group's may hold those of several users."""
        try:
            return self._directory.stat().st_uid == os.geteuid()
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def _add(self, path: Path) -> None:
        try:
            head, tokens = state_file.read_head(path)
            if head.key != self._key:
                raise DamagedError("belongs to another model or other settings")
            self._index[path.name] = StoredPrefix(path, head, tokens)
        except DamagedError as error:
            self._remove(path, error)
        except OSError as error:
            _say(f"{path} cannot be read: {error.strerror}")

    def _remove(self, path: Path, error: DamagedError) -> None:
        _say(f"{path} {error}; it is deleted")
        with suppress(OSError):
            path.unlink()

    def _write_file(self, head: PrefixHead, tokens: Packed, states: list[state_file.Bytes]) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._is_own():
            raise PermissionError(errno.EPERM, "another user owns it")
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self._make_room(sum(head.sizes)):
            return
        name = hashlib.sha256(head.adapter.encode() + tokens.tobytes()).hexdigest()[:32]
        path = self._folder / (name + _SUFFIX)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_native_id()}")
        try:
            state_file.write(unfinished, head, [tokens.view("u1"), *states])
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        for name, other in tuple(self._index.items()):
            length = len(other.tokens)
            lost = length - head.reach(common_length(other.tokens, tokens))
            if other.head.adapter == head.adapter and name != path.name and lost < max(WORTH_READING, GROWTH * length):
                other.path.unlink(missing_ok=True)

    def _make_room(self, size: int) -> bool:
        """Deletes the least recently used files of all models until ``size`` bytes fit. Returns whether they do."""
        files = sorted(_files(self._directory), key=lambda each: each[1].st_mtime)
        used = sum(status.st_size for _, status in files)
        limit = self._limit
        if limit is None:
            limit = min(LIMIT, int((shutil.disk_usage(self._directory).free + used) * LIMIT_SHARE))
        if size > limit:
            return False
        stale = time.time() - _STALE_SECONDS
        for path, status in files:
            unfinished = path.suffix != _SUFFIX
            if (status.st_mtime < stale) if unfinished else (used + size > limit):
                path.unlink(missing_ok=True)
                used -= status.st_size
        return used + size <= limit

    def _read_file(self, reading: FileReading) -> tuple[Saved, list[Checkpoint]] | None:
        stored, began = reading.stored, time.perf_counter()
        try:
            tokens, state, *states = state_file.read(stored.path, stored.head, reading.given_up)
            os.utime(stored.path)
        except DamagedError as error:
            self._remove(stored.path, error)
        except GivenUpError:
            _say(f"{stored.path} is read too slowly, so its tokens are computed")
        except (OSError, MemoryError) as error:
            _say(f"{stored.path} cannot be read: {error}")
        else:
            if stored.n_bytes >= _TELLING:
                self._rate += (stored.n_bytes / (time.perf_counter() - began) - self._rate) / 2
            ids = tokens.view("i4")
            heads = zip(stored.head.checkpoints, states, strict=True)
            adapter = stored.head.adapter
            checkpoints = [Checkpoint(ids[: head.length].copy(), head.least, state, adapter) for head, state in heads]
            return Saved(ids.tolist(), stored.head.least, state, adapter=adapter), checkpoints
        self._index.pop(stored.path.name, None)
        return None


def _files(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in directory.glob("*/*/*"):
        with suppress(OSError):
            yield path, path.stat(follow_symlinks=False)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
