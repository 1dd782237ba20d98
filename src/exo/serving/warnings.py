"""Warnings about a request: what it asks for that has no effect. They go to the log and to the reply."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import final

log = logging.getLogger(__name__)

MAX_WARNINGS = 24
"""Warnings of one request. Further ones are only counted."""
_MAX_CHARACTERS = 2000
_MAX_TEXT = 300
_MAX_LOGGED = 1000
"""Different warnings that one server logs, because clients choose the names of unknown fields."""


@final
class RequestWarnings:
    """The warnings of one request. ``logged`` holds what the server has logged before."""

    def __init__(self, path: str, logged: set[str], *, strict: bool) -> None:
        self.strict = strict
        self._path = path
        self._logged = logged
        self._texts: dict[str, str] = {}
        self._more = 0

    def add(self, param: str, text: str) -> None:
        """Adds a warning and logs its first occurrence. There is at most one for each ``param``."""
        whole = _printable(f"{param}: {text}" if param else text)
        key = param or whole
        if key in self._texts:
            return
        if len(self._texts) == MAX_WARNINGS:
            self._more += 1
            return
        self._texts[key] = whole
        once = f"{self._path} {key}"
        if once not in self._logged and len(self._logged) < _MAX_LOGGED:
            self._logged.add(once)
            log.warning("%s: %s", self._path, whole)

    def in_one_line(self) -> str:
        """All warnings in one line of bounded length; empty if there are none."""
        if not self._texts:
            return ""
        shown: list[str] = []
        room = _MAX_CHARACTERS
        for text in self._texts.values():
            room -= len(text) + 2
            if room < 0:
                break
            shown.append(text)
        more = len(self._texts) - len(shown) + self._more
        return "; ".join([*shown, f"and {more} more"] if more else shown)


_current: ContextVar[RequestWarnings | None] = ContextVar("warnings", default=None)


def _printable(text: str) -> str:
    text = text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
    return "".join(each if " " <= each <= "~" else "?" for each in text.replace("…", "..."))


@contextmanager
def collecting(warnings: RequestWarnings) -> Generator[None]:
    """Has ``warn`` add to ``warnings`` in this context and in the tasks that start in it."""
    token = _current.set(warnings)
    try:
        yield
    finally:
        _current.reset(token)


def warn(param: str, text: str) -> None:
    """Adds the warning ``param: text`` to the current request, if there is one.

    ``param`` is the client's name for the field, without list indices; it is empty if no field is the cause. Warnings
    that come after the reply's headers reach only the log.
    """
    if (warnings := _current.get()) is not None:
        warnings.add(param, text)


def warn_of_context(param: str, wanted: int, context_length: int) -> None:
    """Warns that the model is loaded with a shorter context than the request expects."""
    if wanted > context_length:
        where = "n_ctx in the runner's table of its model card sets it"
        warn(param, f"the model is loaded with a context of {context_length} tokens (got {wanted}); {where}")


def refuses_unknown_fields() -> bool:
    """Whether the server runs with ``--strict``."""
    return (warnings := _current.get()) is not None and warnings.strict
