"""The model hub: the files of a repository at a commit, and their content.

huggingface_hub makes every request: it builds the addresses and headers, finds the token, and its HTTP session follows
redirects without passing the token on to another host. Retries are counted here, because its own cannot be cancelled.
"""

import os
import re
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import import_module
from time import time
from typing import Any

import httpx2
from huggingface_hub import HfApi, ModelInfo, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # pyright: ignore[reportUnknownVariableType]

from exo.config import HubAccess
from exo.store.errors import PullError
from exo.store.folder import RemoteFile

# Otherwise the user agent names the program that exo runs under, and a list of such programs is fetched first.
constants.HF_HUB_DISABLE_TELEMETRY = True

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")
_RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_TIMEOUT_SECONDS = 30
_MAX_RETRIES = 5
_MAX_DOUBLED_SECONDS = 30
_MAX_RETRY_AFTER_SECONDS = 300

_http: Any = import_module("huggingface_hub.utils._http")
_hidden_sessions: list[Any] = []


def _hide_session() -> None:
    """Keeps huggingface_hub from closing its session in a new process.

    It would free OpenSSL objects there, and wait for ever for a lock that another thread held at the fork. The event
    loop waits until the new process has begun its program.
    """
    _hidden_sessions.append(_http._GLOBAL_CLIENT)
    _http._GLOBAL_CLIENT = None


def _show_session() -> None:
    _http._GLOBAL_CLIENT = _hidden_sessions.pop()


os.register_at_fork(before=_hide_session, after_in_parent=_show_session)


class Stopped(Exception):  # noqa: N818 - a cancellation, not an error
    """The pull has been cancelled."""


class Interrupted(Exception):  # noqa: N818 - the request may succeed when it is repeated
    """A request brought no content, or not all of it. ``retry_after`` is the server's wish in seconds."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class WrongRange(Interrupted):
    """The server cannot send the requested range, or sends another."""


class Backoff:
    """Counts consecutive failures and waits after each: twice as long each time, or as long as the server asks."""

    def __init__(self, stop: threading.Event, first_seconds: float) -> None:
        self._stop = stop
        self._first_seconds = first_seconds
        self._failures = 0

    def failed(self, error: PullError, retry_after: float | None = None) -> None:
        """Waits before the next try. Raises ``error`` if there is none left or the wait is too long, and Stopped."""
        self._failures += 1
        if retry_after is not None and retry_after > _MAX_RETRY_AFTER_SECONDS:
            raise PullError(error.code, f"{error}; it asks to wait {retry_after:.0f} seconds, so pull again then")
        if self._failures > _MAX_RETRIES:
            raise error
        doubled = min(self._first_seconds * 2 ** (self._failures - 1), _MAX_DOUBLED_SECONDS)
        if self._stop.wait(doubled if retry_after is None else retry_after):
            raise Stopped

    def succeeded(self) -> None:
        """Starts the count again."""
        self._failures = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at one commit, the ``revision``."""

    repo: str
    revision: str
    files: Mapping[str, RemoteFile | None]
    """By name; None if the hub reports no size or hash."""


class Hub:
    """The hub of the settings. Its methods block."""

    def __init__(self, access: HubAccess, *, backoff_seconds: float = 1) -> None:
        self._access = access
        self._backoff_seconds = backoff_seconds
        self._api = HfApi(endpoint=access.endpoint, token=access.token, library_name="exo")

    def backoff(self, stop: threading.Event) -> Backoff:
        """A count of failures for one file or question."""
        return Backoff(stop, self._backoff_seconds)

    def listing(self, repo: str, stop: threading.Event | None = None) -> Listing:
        """The files of a repository at the newest commit of its main branch. Raises PullError."""
        self.require_online(repo)
        backoff = self.backoff(stop or threading.Event())
        while True:
            try:
                return _listing(repo, self._info(repo))
            except httpx2.TransportError as error:
                reason = f"the hub does not answer: {_cause(error)} ({self._where()})"
                backoff.failed(PullError("unreachable", reason))
            except HfHubHTTPError as error:
                status = error.response.status_code
                failure = PullError("unreachable", f"the hub answered {status} about {repo} ({self._where()})")
                if status not in _RETRIED_STATUSES:
                    raise failure from error
                backoff.failed(failure, _retry_after(error.response))

    @contextmanager
    def content(
        self, repo: str, revision: str, file: RemoteFile, start: int = 0, end: int | None = None
    ) -> Generator[tuple[int, Iterator[bytes]]]:
        """One response with the bytes of a file from ``start`` on, up to ``end`` or further.

        Yields the offset of the response's first byte, which is 0 if the server ignores ranges, and its body in pieces
        as they arrive. Raises Interrupted, also while the body is read, and PullError for what no retry can change.
        """
        url = hf_hub_url(repo, file.name, revision=revision, endpoint=self._api.endpoint)
        headers: dict[str, str] = build_hf_headers(token=self._access.token, library_name="exo")
        headers["Accept-Encoding"] = "identity"
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS) as response:
                yield _first_byte(response, file, start), response.iter_raw()
        except httpx2.RequestError as error:
            raise Interrupted(f"the connection failed: {_cause(error)}") from error

    def require_online(self, repo: str) -> None:
        """Raises PullError if the settings forbid the network."""
        if self._access.offline is not None:
            remedy = f"unset {self._access.offline}, or put its files into a models directory by hand"
            raise PullError("offline", f"{repo} cannot be pulled offline: {remedy}")

    def _info(self, repo: str) -> ModelInfo:
        try:
            return self._api.model_info(repo, files_metadata=True, timeout=_TIMEOUT_SECONDS)
        except GatedRepoError as error:
            remedy = f"accept its terms at {self._api.endpoint}/{repo}, and set HF_TOKEN to a token of that account"
            raise PullError("denied", f"{repo} is gated: {remedy}") from error
        except RepositoryNotFoundError as error:
            remedy = "check the name, and HF_TOKEN if it is private"
            raise PullError("not_found", f"the hub shows no repository {repo}; {remedy} ({self._where()})") from error
        except OfflineModeIsEnabled as error:
            raise PullError("offline", f"{repo} cannot be pulled: HF_HUB_OFFLINE is set; unset it") from error
        except HFValidationError as error:
            raise PullError("not_found", f"{repo!r} is not a repository's name: {error}") from error
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise _denied(repo, error.response.status_code) from error
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            message = f"the answer about {repo} is not a model hub's: {error!r} ({self._where()})"
            raise PullError("unreachable", message) from error

    def _where(self) -> str:
        return f"HF_ENDPOINT is {self._access.endpoint}" if self._access.endpoint else f"at {self._api.endpoint}"


def _listing(repo: str, info: ModelInfo) -> Listing:
    """Checks everything that later becomes part of an address or path, except file names, most of which go unused."""
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise PullError("unreachable", f"the hub gives no commit for {repo}")
    files: dict[str, RemoteFile | None] = {}
    for sibling in info.siblings or ():
        etag = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
        size = sibling.lfs.size if sibling.lfs is not None else sibling.size
        files[sibling.rfilename] = None
        if isinstance(size, int) and size >= 0 and isinstance(etag, str) and _HASH.fullmatch(etag):
            files[sibling.rfilename] = RemoteFile(sibling.rfilename, size, etag)
    return Listing(repo, info.sha, files)


def _first_byte(response: httpx2.Response, file: RemoteFile, start: int) -> int:
    """Checks the head of a response and returns the offset in the file at which its body begins."""
    status = response.status_code
    if status in _RETRIED_STATUSES:
        raise Interrupted(f"the server answers {status}", _retry_after(response))
    if status == 416:
        raise WrongRange(f"the server cannot continue the file at byte {start}")
    if status in (401, 403):
        raise _denied(file.name, status)
    if status not in (200, 206):
        code = "not_found" if status in (404, 410) else "unreachable"
        raise PullError(code, f"{file.name}: the server answers {status}: {response.reason_phrase}")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise PullError("unreachable", f"{file.name}: the server compresses the file, although it was asked not to")
    if status == 200:
        return 0
    sent = response.headers.get("content-range", "")
    found = _CONTENT_RANGE.fullmatch(sent)
    if not found or (int(found[1]), int(found[2])) != (start, file.size):
        raise WrongRange(f"the server sends another range: {sent}")
    return start


def _denied(name: str, status: int) -> PullError:
    return PullError("denied", f"the hub refuses {name} ({status}): set HF_TOKEN to a token that may read it")


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds in a response's Retry-After header, which is a number or a date (RFC 9110, section 10.2.3)."""
    text = response.headers.get("retry-after", "").strip()
    if text.isdecimal() and len(text) <= 9:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time())
    except ValueError:
        return None


def _cause(error: Exception) -> str:
    return str(error) or type(error).__name__
