"""The model hub: what a repository holds at which commit, and where its files are. Bytes are fetched elsewhere.

huggingface_hub makes the requests, builds the addresses and finds the token. It does not fetch the files: its
``hf_hub_download`` (2.4.0) keeps no part of a download that ended early, looks at no hash, and may take a storage
protocol of its own instead of HTTP.
"""

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import httpx2
from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # pyright: ignore[reportUnknownVariableType]

from exo.config import HubAccess
from exo.store.backoff import RETRIED_STATUSES, Backoff, retry_after
from exo.store.errors import PullError
from exo.store.remote_file import RemoteFile

# Else the user agent would name the program that exo runs under, after fetching a list of such programs.
constants.HF_HUB_DISABLE_TELEMETRY = True

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_TIMEOUT_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at one commit."""

    repo: str
    revision: str
    """The commit's hash."""
    files: Mapping[str, RemoteFile | None]
    """By name; None where the hub does not give size and hash."""


class Hub:
    """The hub as the settings give it. Its methods block."""

    def __init__(self, access: HubAccess, *, backoff_seconds: float = 1) -> None:
        self.access = access
        self._backoff_seconds = backoff_seconds
        self._api = HfApi(endpoint=access.endpoint, token=access.token, library_name="exo")

    def backoff(self, stop: threading.Event) -> Backoff:
        """A count of failures for one file or question."""
        return Backoff(stop, self._backoff_seconds)

    def headers(self) -> dict[str, str]:
        """Headers of a request to the hub, with the token, if there is one."""
        return build_hf_headers(token=self.access.token, library_name="exo")

    def url(self, repo: str, revision: str, name: str) -> str:
        """Where a file is, or is redirected from."""
        return hf_hub_url(repo, name, revision=revision, endpoint=self._api.endpoint)

    def listing(self, repo: str, revision: str | None = None, stop: threading.Event | None = None) -> Listing:
        """The files of a repository, by default at the newest commit of its main branch. Raises PullError."""
        self.require_online(repo)
        backoff = self.backoff(stop or threading.Event())
        while True:
            try:
                return _listing(repo, self._info(repo, revision))
            except httpx2.TransportError as error:
                backoff.failed(PullError("unreachable", f"the hub does not answer: {_cause(error)} ({self._where()})"))
            except HfHubHTTPError as error:
                status = error.response.status_code
                failure = PullError("unreachable", f"the hub answered {status} about {repo} ({self._where()})")
                if status not in RETRIED_STATUSES:
                    raise failure from error
                backoff.failed(failure, retry_after(error.response.headers.get("retry-after")))

    def require_online(self, repo: str) -> None:
        """Raises PullError where the network may not be used."""
        if self.access.offline is not None:
            remedy = f"unset {self.access.offline}, or put its files into a models directory by hand"
            raise PullError("offline", f"{repo} cannot be pulled offline: {remedy}")

    def _info(self, repo: str, revision: str | None) -> ModelInfo:
        try:
            return self._api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS)
        except GatedRepoError as error:
            raise PullError("denied", f"{repo} is gated: {_licence(repo, self._api.endpoint)}") from error
        except RepositoryNotFoundError as error:
            remedy = "check the name, and HF_TOKEN if it is private"
            raise PullError("not_found", f"the hub shows no repository {repo}; {remedy} ({self._where()})") from error
        except RevisionNotFoundError as error:
            raise PullError("not_found", f"{repo} has no revision {revision}") from error
        except OfflineModeIsEnabled as error:
            raise PullError("offline", f"{repo} cannot be pulled: HF_HUB_OFFLINE is set; unset it") from error
        except HFValidationError as error:
            raise PullError("not_found", f"{repo!r} is not a repository's name: {error}") from error
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise denied(repo, error.response.status_code) from error
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            message = f"the answer about {repo} is not a model hub's: {error!r} ({self._where()})"
            raise PullError("unreachable", message) from error

    def _where(self) -> str:
        return f"HF_ENDPOINT is {self.access.endpoint}" if self.access.endpoint else f"at {self._api.endpoint}"


def denied(repo: str, status: int) -> PullError:
    """What to do where the hub refuses."""
    return PullError("denied", f"the hub refuses {repo} ({status}): set HF_TOKEN to a token that may read it")


def _licence(repo: str, endpoint: str) -> str:
    return f"accept its terms at {endpoint}/{repo}, and set HF_TOKEN to a token of that account"


def _listing(repo: str, info: ModelInfo) -> Listing:
    """Checks what later goes into addresses and file names, except the files' own names: most are never used."""
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


def _cause(error: Exception) -> str:
    return str(error) or type(error).__name__
