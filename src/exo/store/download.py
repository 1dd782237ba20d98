"""One file over plain HTTP into a part that grows, survives the process, and is hashed while it comes."""

import errno
import os
import re
import threading
from collections.abc import Mapping
from http.client import HTTPResponse
from pathlib import Path
from urllib.error import HTTPError

from exo.store.backoff import RETRIED_STATUSES, Backoff, Stopped, retry_after
from exo.store.digest import BATCH, Digest
from exo.store.errors import PullError
from exo.store.folder import store_error
from exo.store.http_stream import Client, ConnectionLost, pieces
from exo.store.hub import RemoteFile, denied
from exo.store.progress import Meter
from exo.store.writeback import Writeback

_PIECE = 1 << 18
"""Bytes that are received at once; as many are lost at most when the process is killed."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")


class _Failed(Exception):  # noqa: N818 - not an error yet: it may be tried again
    """A try that brought no more, and how long the server asks to wait."""

    def __init__(self, message: str, asked_seconds: float | None = None) -> None:
        super().__init__(message)
        self.asked_seconds = asked_seconds


class Download:
    """Fetches one file. ``url`` may redirect; a token in ``headers`` stays with the first host."""

    def __init__(
        self,
        client: Client,
        url: str,
        headers: Mapping[str, str],
        file: RemoteFile,
        part: Path,
        *,
        meter: Meter,
        stop: threading.Event,
        backoff: Backoff,
    ) -> None:
        self._client = client
        self._url = url
        self._headers = headers
        self._file = file
        self._part = part
        self._meter = meter
        self._stop = stop
        self._backoff = backoff
        self._have = 0
        self._most = 0
        """The most bytes there ever were: a server that starts over again and again makes no headway."""

    def run(self) -> str:
        """Completes the part, verifies it and forces it to the disk. Returns its SHA-256.

        Raises PullError, after which the part is still there unless its content is wrong, and Stopped.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with (
                open(os.open(self._part, flags, 0o644), "r+b", buffering=0) as part,
                Digest(self._file) as digest,
                Writeback(part.fileno()) as self._writeback,
            ):
                return self._complete(part.fileno(), digest)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise store_error(self._part, error) from error
            place, lacking = self._part.parent.parent.parent, self._file.size - self._part.stat().st_size
            message = f"no room in {place}: {self._file.name} needs {lacking:,} bytes more ({error.strerror})"
            raise PullError(
                "disk_full", f"{message}; what has come is kept, so pull again when there is room"
            ) from error

    def _complete(self, part: int, digest: Digest) -> str:
        resumed = self._resume(part, digest)
        while True:
            while self._have < self._file.size:
                self._try(part, digest)
            sha256, found = digest.finish()
            if found == self._file.etag:
                self._writeback.finish()
                return sha256
            self._restart(part, digest)
            if not resumed:  # else what was there before may be at fault, as after a power cut
                self._part.unlink()
                message = f"{self._file.name} came with the hash {found} instead of {self._file.etag}; it was deleted"
                raise PullError("wrong_content", message)
            resumed = False

    def _resume(self, part: int, digest: Digest) -> bool:
        """Hashes what is there. Returns whether there is anything."""
        if os.fstat(part).st_size > self._file.size:
            os.truncate(part, 0)
        self._meter.step = "checking"
        while data := os.pread(part, BATCH, self._have):
            self._came(data, digest)
        self._most = self._have
        return self._have > 0

    def _try(self, part: int, digest: Digest) -> None:
        self._meter.step = "downloading"
        try:
            self._receive(part, digest)
        except ConnectionLost as error:
            failure, asked = f"{self._file.name}: the connection failed: {error}", None
        except _Failed as error:
            failure, asked = f"{self._file.name}: {error}", error.asked_seconds
        else:
            return
        if self._have > self._most + BATCH:
            self._backoff.succeeded()
        self._most = max(self._most, self._have)
        self._meter.note = failure
        self._backoff.failed(PullError("unreachable", f"{failure}; what has come is kept, so pull again"), asked)
        self._meter.note = ""

    def _receive(self, part: int, digest: Digest) -> None:
        """One request, for all that is lacking."""
        with self._client.get(self._url, self._headers, self._have) as answer:
            if isinstance(answer, HTTPError):
                raise self._refusal(answer, part, digest)
            self._check_answer(answer, part, digest)
            for data in pieces(answer, _PIECE):
                if self._have + len(data) > self._file.size:
                    self._restart(part, digest)
                    raise _Failed(f"the server sends more than {self._file.size} bytes")
                written = 0
                while written < len(data):
                    written += os.write(part, data[written:] if written else data)
                self._writeback.wrote(len(data))
                self._came(data, digest)
                self._meter.fetched += len(data)
        if self._have < self._file.size:
            raise _Failed(f"the server sent {self._have} of {self._file.size} bytes")

    def _refusal(self, answer: HTTPError, part: int, digest: Digest) -> Exception:
        """What an answer without the file means."""
        status = answer.status or 0
        if status in RETRIED_STATUSES:
            return _Failed(f"the server answers {status}", retry_after(answer.headers.get("retry-after")))
        if status == 416:
            self._restart(part, digest)
            return _Failed("the server cannot go on where the download ended, so it starts over")
        if status in (401, 403):
            return denied(self._file.name, status)
        code = "not_found" if status in (404, 410) else "unreachable"
        return PullError(code, f"{self._file.name}: the server answers {status}: {answer.reason}")

    def _check_answer(self, answer: HTTPResponse, part: int, digest: Digest) -> None:
        """Whether the body goes on where the part ends; a whole file is taken from its start."""
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise PullError("unreachable", f"{self._file.name}: the server compresses what it should send as it is")
        if answer.status == 206:
            sent = answer.headers.get("content-range", "")
            found = _CONTENT_RANGE.fullmatch(sent)
            if not found or (int(found[1]), int(found[2])) != (self._have, self._file.size):
                self._restart(part, digest)
                raise _Failed(f"the server sends another range than asked for: {sent}")
        elif self._have:
            self._restart(part, digest)

    def _restart(self, part: int, digest: Digest) -> None:
        os.truncate(part, 0)
        digest.restart()
        self._have = self._meter.file_done = 0

    def _came(self, data: bytes, digest: Digest) -> None:
        digest.add(data)
        self._have += len(data)
        self._meter.file_done = self._have
        if self._stop.is_set():
            raise Stopped
