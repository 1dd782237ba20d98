"""How far a pull has come. The thread that pulls writes the meter; whoever shows progress reads it."""

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

Step = Literal["waiting", "checking", "downloading"]

_WINDOW_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a pull. Sizes are bytes; ``done`` and ``total`` count the whole pull, what was there included."""

    step: Step
    """Waiting for another pull of the same model, hashing what is there already, or downloading."""
    file: str
    """The file at hand; empty between files."""
    file_done: int
    file_total: int
    done: int
    total: int
    rate: float
    """Bytes a second that came over the network in the last five seconds."""
    seconds_left: float | None
    """At that rate; None where there is none."""
    note: str = ""
    """Why nothing comes at the moment, where that is known."""


@dataclass(slots=True)
class Meter:
    """Counters with one writer."""

    total: int
    step: Step = "checking"
    file: str = ""
    file_done: int = 0
    file_total: int = 0
    before: int = 0
    """Bytes of the files that are whole already."""
    fetched: int = 0
    """Bytes that came over the network."""
    note: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _seen: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])

    def start(self, file: str, size: int) -> None:
        """The next file."""
        with self._lock:
            self.file, self.file_done, self.file_total = file, 0, size

    def finish(self) -> None:
        """The file at hand is whole."""
        with self._lock:
            self.before += self.file_total
            self.file, self.file_done, self.file_total = "", 0, 0

    def read(self) -> Progress:
        """For one reader, which sees the rate since it last looked, over at most five seconds."""
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
        return Progress(self.step, file, file_done, file_total, done, self.total, rate, left, self.note)
