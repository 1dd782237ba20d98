"""The first bytes of a file on the hub, by range requests for as many as are asked for."""

import threading

from exo.store.errors import PullError
from exo.store.folder import RemoteFile, check_name
from exo.store.hub import Hub, Interrupted, Listing, WrongRange
from exo.worker.runner_common.model_files.folder_weights import INDEX, names_in_index

FIRST = 1 << 20
"""Bytes of the first request; each later one doubles what there is."""
_WHOLE_LIMIT = 32 << 20


class RemoteBytes:
    """The beginning of a file, fetched piece by piece when it is read. Pieces cannot be verified: they have no hash."""

    def __init__(self, hub: Hub, repo: str, revision: str, file: RemoteFile) -> None:
        self._hub = hub
        self._repo = repo
        self._revision = revision
        self._file = file
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
            after: float | None = None
            try:
                with self._hub.content(self._repo, self._revision, self._file, before, wanted) as (start, pieces):
                    del self._data[start:]  # all of it if the server ignores the range
                    for piece in pieces:
                        self._data += piece[: wanted - len(self._data)]
                        if len(self._data) >= wanted:
                            break
                failure = f"the server sent {len(self._data)} of {wanted} bytes"
            except WrongRange as error:
                raise PullError("unreachable", f"{self._file.name}: {error}") from error
            except Interrupted as error:
                failure, after = str(error), error.retry_after
            if len(self._data) <= before:
                backoff.failed(PullError("unreachable", f"{self._file.name}: {failure}"), after)
        return self._data


def start_of(listing: Listing, hub: Hub, name: str) -> RemoteBytes:
    """A file that is in the listing. Raises PullError."""
    check_name(name)
    file = listing.files[name]
    if file is None:
        raise PullError("unreachable", f"the hub gives no size of {name}")
    return RemoteBytes(hub, listing.repo, listing.revision, file)


def small_file(listing: Listing, hub: Hub, name: str) -> bytes | None:
    """All of a small file; None if the repository has none of that name. Raises PullError."""
    if name not in listing.files:
        return None
    start = start_of(listing, hub, name)
    if start.size > _WHOLE_LIMIT:
        raise PullError("wrong_content", f"{name} has {start.size:,} bytes, expected at most {_WHOLE_LIMIT:,}")
    return bytes(start.upto(start.size))


def indexed(listing: Listing, hub: Hub) -> frozenset[str] | None:
    """The names in the repository's index of weights; None without one. Raises PullError."""
    content = small_file(listing, hub, INDEX)
    try:
        return None if content is None else names_in_index(content)
    except ValueError as error:
        raise PullError("wrong_content", f"{listing.repo}: {INDEX} {error}") from error
