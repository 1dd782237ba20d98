"""The progress of a pull. The pulling thread writes the meter; the event loop reads it."""

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

Step = Literal["waiting", "checking", "downloading"]

_WINDOW_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """A snapshot of a pull. Sizes are in bytes; ``done`` and ``total`` include files that were already on disk."""

    step: Step
    """Waiting for another pull of the same model, hashing data that is already on disk, or downloading."""
    file: str
    """The current file; empty between files."""
    file_done: int
    file_total: int
    done: int
    total: int
    rate: float
    """Bytes a second over the network in the last five seconds."""
    seconds_left: float | None
    """At this rate; None if it is 0."""
    note: str = ""
    """Why the pull is stalled, if known."""


@dataclass(slots=True)
class Meter:
    """Counters with one writer and one reader."""

    total: int
    step: Step = "checking"
    file: str = ""
    file_done: int = 0
    file_total: int = 0
    before: int = 0
    """Bytes of the complete files."""
    fetched: int = 0
    """Bytes received over the network."""
    note: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _seen: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])

    def start(self, file: str, size: int) -> None:
        """Makes the next file the current one."""
        with self._lock:
            self.file, self.file_done, self.file_total = file, 0, size

    def finish(self) -> None:
        """Marks the current file as complete."""
        with self._lock:
            self.before += self.file_total
            self.file, self.file_done, self.file_total = "", 0, 0

    def read(self) -> DownloadProgress:
        """A snapshot, with the rate since the previous snapshots of at most five seconds ago."""
        with self._lock:
            file, file_done, file_total = self.file, self.file_done, self.file_total
            done = self.before + file_done
        now = time.monotonic()
        self._seen.append((now, self.fetched))
        while now - self._seen[0][0] > _WINDOW_SECONDS:
            self._seen.popleft()
        seconds = now - self._seen[0][0]
        rate = (self._seen[-1][1] - self._seen[0][1]) / seconds if seconds else 0.0
        left = (self.total - done) / rate if rate else None
        return DownloadProgress(self.step, file, file_done, file_total, done, self.total, rate, left, self.note)
