"""Waiting between the tries of something that may yet succeed."""

import threading
from email.utils import parsedate_to_datetime
from time import time

from exo.store.errors import PullError

RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_DOUBLED_SECONDS = 30
_LONGEST_ASKED_SECONDS = 300


class Stopped(Exception):  # noqa: N818 - nothing is wrong: nobody wants it any more
    """What was being done has been called off."""


class Backoff:
    """Counts failures in a row, and waits after each: twice as long each time, or as long as the server asks for."""

    def __init__(self, stop: threading.Event, first_seconds: float = 1, retries: int = 5) -> None:
        self._stop = stop
        self._first_seconds = first_seconds
        self._retries = retries
        self._failures = 0

    def failed(self, error: PullError, asked_seconds: float | None = None) -> None:
        """Waits. Raises ``error`` after one failure too many, or if the server asks for too much, and Stopped."""
        self._failures += 1
        if asked_seconds is not None and asked_seconds > _LONGEST_ASKED_SECONDS:
            raise PullError(error.code, f"{error}; it asks to wait {asked_seconds:.0f} seconds, so pull again then")
        if self._failures > self._retries:
            raise error
        doubled = min(self._first_seconds * 2 ** (self._failures - 1), _LONGEST_DOUBLED_SECONDS)
        if self._stop.wait(doubled if asked_seconds is None else asked_seconds):
            raise Stopped

    def succeeded(self) -> None:
        """The next failure counts as the first again."""
        self._failures = 0


def retry_after(value: str | None) -> float | None:
    """Seconds that a server's Retry-After asks to wait (RFC 9110, section 10.2.3: seconds, or a date)."""
    text = (value or "").strip()
    if text.isdecimal() and len(text) <= 9:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time())
    except ValueError:
        return None
