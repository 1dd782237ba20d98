"""Why a runner cannot load a model."""

from typing import Literal

LoadErrorCode = Literal["model_not_found", "model_misconfigured", "model_load_failed", "out_of_memory"]
_LONGEST = 400


class LoadError(Exception):
    """The model cannot be loaded; ``code`` is one of ``messages.ErrorCode``."""

    def __init__(self, code: LoadErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: LoadErrorCode = code


def from_library(what: str, error: BaseException, *, out_of_memory: bool) -> LoadError:
    """With the library's own words, shortened: a strict load lists every tensor that is missing."""
    if isinstance(error, LoadError):
        return error
    detail = " ".join(str(error).split())
    detail = f"{type(error).__name__}: {detail if len(detail) <= _LONGEST else detail[:_LONGEST] + '…'}"
    return LoadError("out_of_memory" if out_of_memory else "model_load_failed", f"{what}: {detail}")
