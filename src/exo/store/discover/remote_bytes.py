"""The first bytes of a file on the hub, by range requests for as many as are asked for."""

import re
import threading
from http.client import HTTPResponse
from urllib.error import HTTPError

from exo.store.backoff import RETRIED_STATUSES, retry_after
from exo.store.errors import PullError
from exo.store.http_stream import Client, ConnectionLost, pieces
from exo.store.hub import Hub, RemoteFile, denied

FIRST = 1 << 20
"""Bytes of the first request; each later one doubles what there is."""
_PIECE = 1 << 16
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")


class RemoteBytes:
    """The beginning of a file, which is fetched as it is asked for. What comes cannot be verified: it has no hash."""

    def __init__(self, hub: Hub, repo: str, revision: str, file: RemoteFile) -> None:
        self._hub = hub
        self._url = hub.url(repo, revision, file.name)
        self._file = file
        self._client = Client()
        self._data = bytearray()

    @property
    def size(self) -> int:
        """Bytes of the whole file, by the hub's listing."""
        return self._file.size

    def upto(self, end: int) -> bytearray:
        """At least the first ``end`` bytes, of which the file must have as many. Raises PullError."""
        backoff = self._hub.backoff(threading.Event())
        while len(self._data) < end:
            wanted, before = min(max(end, FIRST, 2 * len(self._data)), self._file.size), len(self._data)
            after: str | None = None
            try:
                headers = {**self._hub.headers(), "Range": f"bytes={before}-{wanted - 1}"}
                with self._client.get(self._url, headers, 0) as answer:
                    after = answer.headers.get("retry-after")
                    self._receive(answer, wanted)
                failure = f"the server sent {len(self._data)} of {wanted} bytes"
            except ConnectionLost as error:
                failure = f"the connection failed: {error}"
            except HTTPError as error:
                failure = f"the server answers {error.status}"
            if len(self._data) <= before:
                backoff.failed(PullError("unreachable", f"{self._file.name}: {failure}"), retry_after(after))
        return self._data

    def _receive(self, answer: HTTPResponse | HTTPError, wanted: int) -> None:
        """Adds what comes, and stops at ``wanted`` bytes, whatever the server goes on to send."""
        if isinstance(answer, HTTPError):
            raise self._refusal(answer)
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise PullError("unreachable", f"{self._file.name}: the server compresses what it should send as it is")
        if answer.status == 206:
            sent = answer.headers.get("content-range", "")
            found = _CONTENT_RANGE.fullmatch(sent)
            if not found or (int(found[1]), int(found[2])) != (len(self._data), self._file.size):
                raise PullError("unreachable", f"{self._file.name}: the server sends another range: {sent}")
        else:  # the whole file
            self._data.clear()
        for piece in pieces(answer, _PIECE):
            self._data += piece[: wanted - len(self._data)]
            if len(self._data) >= wanted:
                return

    def _refusal(self, answer: HTTPError) -> Exception:
        """What to raise for an answer without the file: the answer itself where it may be asked again."""
        status = answer.status or 0
        if status in RETRIED_STATUSES:
            return answer
        if status in (401, 403):
            return denied(self._file.name, status)
        code = "not_found" if status in (404, 410) else "unreachable"
        return PullError(code, f"{self._file.name}: the server answers {status}: {answer.reason}")
