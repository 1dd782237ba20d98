"""Downloads one file into a part that survives the process, and verifies it.

huggingface_hub makes the requests (see ``hub``), but its own downloaders cannot replace this module. This is what
huggingface_hub 2.4.0 and hf_xet 1.8.0 did with the faults of ``tests/support/hub.py``:

- Wrong content is accepted: ``http_get`` and ``hf_hub_download`` compare sizes, not hashes.
- A killed download starts again at byte 0. ``hf_hub_download`` writes to a temporary file with a random name, and
  ``http_get`` buffers 10 MiB before it writes, so that it also loses them with every lost connection.
- A connection reset and a status 503 are not retried. A Retry-After of two hours is obeyed, and no wait can be
  cancelled.
- ``http_get`` appends to a bad part, and a response that is longer than the file.
- The streams of hf_xet can begin at any byte, but cannot be cancelled: ``cancel`` raises an error while another thread
  reads, and a reader whose server stalls waits more than 45 seconds after ``abort``. Files therefore come over HTTP.
"""

import errno
import hashlib
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from exo.store.errors import PullError
from exo.store.folder import ModelFolder, RemoteFile, store_error
from exo.store.hub import Hub, Interrupted, Stopped, WrongRange
from exo.store.progress import Meter
from exo.store.sharing import share

_BATCH = 1 << 20
"""Bytes that are hashed at once."""
_MAX_QUEUED = 4
"""Batches that may wait to be hashed. More would only fill memory."""
_SYNCED_AT_ONCE = 64 << 20
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Digest:
    """The hashes of a file. They are computed in ``thread``, since hashing takes about as long as writing."""

    def __init__(self, file: RemoteFile, thread: ThreadPoolExecutor) -> None:
        self._file = file
        self._thread = thread
        self._queued: deque[Future[None]] = deque()
        self.restart()

    def restart(self) -> None:
        """Starts again at the file's first byte."""
        self._batch = bytearray()
        self._hashes = [hashlib.sha256()]
        if (
            len(self._file.etag) != 64
        ):  # a git blob id: SHA-1 of a header and the content ("Git Internals", Git Objects)
            header = f"blob {self._file.size}\0".encode()
            self._hashes.append(hashlib.sha1(header, usedforsecurity=False))

    def add(self, data: bytes) -> None:
        """Adds the next bytes."""
        self._batch += data
        if len(self._batch) >= _BATCH:
            self._submit()

    def finish(self) -> tuple[str, str]:
        """The SHA-256 and the hash to compare with the etag."""
        self._submit()
        self._queued[-1].result()
        return self._hashes[0].hexdigest(), self._hashes[-1].hexdigest()

    def _submit(self) -> None:
        if len(self._queued) >= _MAX_QUEUED:
            self._queued.popleft().result()
        hashes, batch = self._hashes, self._batch

        def update() -> None:
            for each in hashes:
                each.update(batch)

        self._queued.append(self._thread.submit(update))
        self._batch = bytearray()


def hash_file(path: Path, file: RemoteFile, meter: Meter, stop: threading.Event) -> tuple[str, str]:
    """The SHA-256 of a file on disk and the hash to compare with the etag. Raises Stopped and OSError."""
    with path.open("rb") as opened, ThreadPoolExecutor(1) as thread:
        digest = Digest(file, thread)
        while data := opened.read(_BATCH):
            digest.add(data)
            meter.file_done += len(data)
            if stop.is_set():
                raise Stopped
        return digest.finish()


class Download:
    """The download of one file of ``folder``'s repository at a commit."""

    def __init__(
        self, hub: Hub, folder: ModelFolder, revision: str, file: RemoteFile, meter: Meter, stop: threading.Event
    ) -> None:
        self._hub = hub
        self._folder = folder
        self._revision = revision
        self._file = file
        self._path = folder.part(file.name, file.etag)
        self._meter = meter
        self._stop = stop
        self._backoff = hub.backoff(stop)
        self._have = 0
        self._most = 0
        """The most bytes there ever were. A server that starts over again and again makes no progress."""
        self._unsynced = 0
        self._syncing: Future[None] | None = None

    def run(self) -> str:
        """Completes the part, verifies it and forces it to the disk. Returns its SHA-256.

        Raises Stopped, and PullError, which deletes the part only if its content is wrong.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with (
                open(os.open(self._path, flags, 0o666), "r+b", buffering=0) as part,
                ThreadPoolExecutor(1, thread_name_prefix="hash") as hasher,
                ThreadPoolExecutor(1, thread_name_prefix="sync") as self._syncer,
            ):
                self._part = part.fileno()
                share(self._part, self._path.parent)
                self._digest = Digest(self._file, hasher)
                return self._complete()
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise store_error(self._path, error) from error
            missing = self._file.size - self._path.stat().st_size
            message = f"no room in {self._folder.directory}: {self._file.name} needs {missing:,} bytes more"
            raise PullError(
                "disk_full", f"{message} ({error.strerror}); what has come is kept, so pull again when there is room"
            ) from error

    def _complete(self) -> str:
        self._meter.step = "checking"
        if os.fstat(self._part).st_size > self._file.size:
            os.truncate(self._part, 0)
        while data := os.pread(self._part, _BATCH, self._have):
            self._add(data)
        resumed, self._most = self._have > 0, self._have
        while True:
            while self._have < self._file.size:
                self._try()
            sha256, found = self._digest.finish()
            if found == self._file.etag:
                self._sync_result()
                os.fsync(self._part)
                return sha256
            self._restart()
            if not resumed:  # otherwise the old part may be at fault, as after a power cut
                self._path.unlink()
                message = f"{self._file.name} came with the hash {found} instead of {self._file.etag}; it was deleted"
                raise PullError("wrong_content", message)
            resumed = False

    def _try(self) -> None:
        """One request for everything that is missing. If it fails, waits until the next may be sent."""
        self._meter.step = "downloading"
        before, retry_after = self._have, None
        try:
            with self._hub.content(self._folder.repo, self._revision, self._file, self._have) as (start, pieces):
                if start < self._have:
                    self._restart()
                for data in pieces:
                    self._write(data)
            if self._have == self._file.size:
                return
            failure = f"the server sent {self._have} of {self._file.size} bytes"
        except WrongRange as error:
            self._restart()
            failure = str(error)
        except Interrupted as error:
            failure, retry_after = str(error), error.retry_after
            if self._have > before:
                failure += f" after {self._have} of {self._file.size} bytes"
        if self._have > self._most + _BATCH:
            self._backoff.succeeded()
        self._most = max(self._most, self._have)
        self._meter.note = f"{self._file.name}: {failure}"
        message = f"{self._meter.note}; what has come is kept, so pull again"
        self._backoff.failed(PullError("unreachable", message), retry_after)
        self._meter.note = ""

    def _write(self, data: bytes) -> None:
        if self._have + len(data) > self._file.size:
            self._restart()
            raise Interrupted(f"the server sends more than {self._file.size} bytes")
        written = 0
        while written < len(data):
            written += os.write(self._part, data[written:] if written else data)
        self._add(data)
        self._meter.fetched += len(data)
        self._unsynced += len(data)
        # If the whole file were left to the end, the kernel would first slow down the writer, because too much memory
        # waits to be written, and the last sync would take long.
        if self._unsynced >= _SYNCED_AT_ONCE and (self._syncing is None or self._syncing.done()):
            self._sync_result()
            self._unsynced = 0
            self._syncing = self._syncer.submit(os.fsync, self._part)

    def _sync_result(self) -> None:
        """Raises the error of the last sync: the kernel reports a failed write only once."""
        if self._syncing is not None:
            self._syncing.result()

    def _add(self, data: bytes) -> None:
        self._digest.add(data)
        self._have += len(data)
        self._meter.file_done = self._have
        if self._stop.is_set():
            raise Stopped

    def _restart(self) -> None:
        os.truncate(self._part, 0)
        self._digest.restart()
        self._have = self._meter.file_done = 0
