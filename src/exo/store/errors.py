"""The exception raised when a model's files cannot be listed, pulled or removed."""

from typing import Literal

PullErrorCode = Literal[
    "busy",  # another process has locked the model's folder
    "denied",  # the hub requires a token, another token, or an accepted licence
    "disk_full",
    "no_match",  # neither the card nor the repository determines the files
    "not_found",  # no such repository, revision or file, or nothing to remove
    "not_pullable",  # the card names no repository
    "offline",
    "read_only",
    "store",  # the models directory cannot be used
    "unreachable",  # the hub does not answer, or its answer is unusable
    "unsafe_name",  # a file name from the hub that could leave the models directory
    "wrong_content",  # a size or hash differs from the listing
]


class PullError(Exception):
    """A message that names the remedy, and a code for programs."""

    def __init__(self, code: PullErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: PullErrorCode = code
