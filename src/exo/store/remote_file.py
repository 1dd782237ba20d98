"""A file on the hub, without what asks the hub: what is on disk can be looked at without its library."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a repository. The name is as the hub says it, and not safe to use as a path."""

    name: str
    size: int
    etag: str
    """What names its content: its SHA-256 (64 digits), or git's blob id (40) for small files that are in git itself."""
