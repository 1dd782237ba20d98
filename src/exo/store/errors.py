"""The one exception of listing, pulling and removing a model's files."""

from typing import Literal

PullErrorCode = Literal[
    "busy",  # another pull has the model's folder
    "denied",  # the hub wants a token, another token, or a licence accepted
    "disk_full",
    "no_match",  # the repository, or the card, does not say which files
    "not_found",  # no such repository, revision or file, or nothing to remove
    "not_pullable",  # the card names no repository
    "offline",
    "read_only",
    "store",  # the models directory cannot be used
    "unreachable",  # the hub did not answer, or not with what was asked for
    "unsafe_name",  # a file name from the hub that could leave the models directory
    "wrong_content",  # size or hash is not what the hub said
]


class PullError(Exception):
    """What went wrong, in words that name the remedy; ``code`` is for programs."""

    def __init__(self, code: PullErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: PullErrorCode = code
