"""The hashes of a file while it comes, and of one that is there."""

import hashlib
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from exo.store.backoff import Stopped
from exo.store.hub import RemoteFile
from exo.store.progress import Meter

BATCH = 1 << 20
"""Bytes that are hashed at once."""
_AHEAD = 4
"""Batches that may wait to be hashed: more would only fill memory."""


class Digest:
    """The hash of a file in a thread of its own: it costs about as much time as writing does."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._queued: deque[Future[None]] = deque()
        self._batch: list[bytes] = []
        self.restart()

    def restart(self) -> None:
        """From the file's first byte."""
        self._drain()
        self._held = 0
        self._sha256 = hashlib.sha256()
        # Git hashes a file behind a header of its own: its documentation, "Git Internals: Git Objects".
        self._git = None if len(self._file.etag) == 64 else hashlib.sha1(usedforsecurity=False)
        if self._git is not None:
            self._git.update(f"blob {self._file.size}\0".encode())

    def add(self, data: bytes) -> None:
        """The next bytes."""
        self._batch.append(data)
        self._held += len(data)
        if self._held >= BATCH:
            self._flush()

    def finish(self) -> tuple[str, str]:
        """The SHA-256, and what is to be compared with the etag."""
        self._flush()
        self._drain()
        sha256 = self._sha256.hexdigest()
        return sha256, sha256 if self._git is None else self._git.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hasher.shutdown()

    def _flush(self) -> None:
        while len(self._queued) >= _AHEAD:
            self._queued.popleft().result()
        self._queued.append(self._hasher.submit(self._update, self._batch))
        self._batch, self._held = [], 0

    def _drain(self) -> None:
        while self._queued:
            self._queued.popleft().result()
        self._batch = []

    def _update(self, batch: Iterable[bytes]) -> None:
        data = b"".join(batch)
        self._sha256.update(data)
        if self._git is not None:
            self._git.update(data)


def hash_file(path: Path, file: RemoteFile, meter: Meter, stop: threading.Event) -> tuple[str, str]:
    """The SHA-256 of a file that is there, and what is to be compared with the etag. Raises Stopped and OSError."""
    with path.open("rb") as opened, Digest(file) as digest:
        while data := opened.read(BATCH):
            digest.add(data)
            meter.file_done += len(data)
            if stop.is_set():
                raise Stopped
        return digest.finish()
