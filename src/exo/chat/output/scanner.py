"""Scans text that arrives in pieces. Parsers are generators that read from a ``Scanner``.

A parser yields the parts it has read, and ``MORE`` if it needs more text to continue. Parsing is linear: undecided text
is never longer than the longest marker, and each character is read a bounded number of times.
"""

import re
from collections.abc import Callable, Generator, Iterable
from enum import Enum
from functools import lru_cache
from typing import TypeVar, final

from exo.chat.output.events import Part

Result = TypeVar("Result")


class _More(Enum):
    TEXT = "text"


MORE = _More.TEXT
"""Yielded by a parser to wait for more text, or for the end."""
Steps = Generator[Part | _More | None, None, Result]
"""A parser or a part of one. A ``None`` that it yields is ignored."""


class Markers:
    """A search for the first of several texts, none of which is a prefix of another. Immutable."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(texts)
        self._any = re.compile("|".join(map(re.escape, self.texts)) or "(?!)")
        self._beginnings = {text[:length] for text in self.texts for length in range(1, len(text))}
        self._longest = max(map(len, self.texts), default=1)

    def search(self, text: str, at: int) -> re.Match[str] | None:
        """Returns the first marker in ``text`` from ``at`` on."""
        return self._any.search(text, at)

    def unsure(self, text: str, at: int) -> int:
        """Returns how many characters at the end of ``text``, from ``at`` on, may begin a marker."""
        for length in range(min(self._longest - 1, len(text) - at), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0


@lru_cache(maxsize=64)
def markers(*texts: str) -> Markers:
    """Returns the markers with these texts, compiled once."""
    return Markers(texts)


@final
class Scanner:
    """The text of one reply. ``release`` returns the text read since ``hold``."""

    def __init__(self) -> None:
        self.ended = False
        self.cut_off = False
        """Whether something other than the model ended the text."""
        self._text = ""
        self._at = 0
        self._held: list[str] | None = None

    @property
    def waiting(self) -> int:
        """The number of unread characters. It is less than the longest marker while a parser waits for more text."""
        return len(self._text) - self._at

    @property
    def at_end(self) -> bool:
        """Whether the whole reply has been read."""
        return self.ended and not self.waiting

    def feed(self, text: str) -> None:
        """Appends text."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self, *, cut_off: bool) -> None:
        """Marks the end of the text."""
        self.ended = True
        self.cut_off = cut_off

    def hold(self, text: str = "") -> None:
        """Starts to record the text read, beginning with ``text``."""
        self._held = [text]

    def release(self) -> str:
        """Stops recording and returns the text read since ``hold``."""
        held, self._held = self._held or [], None
        return "".join(held)

    def unread(self, text: str) -> None:
        """Puts back ``text``, the last text read. To stay linear, do so only a few times with each character."""
        left = len(text)
        while left and self._held:
            piece = self._held.pop()
            if len(piece) > left:
                self._held.append(piece[:-left])
            left -= min(left, len(piece))
        if self._text.startswith(text, self._at - len(text)) and self._at >= len(text):
            self._at -= len(text)
        else:
            self._text = text + self._text[self._at :]
            self._at = 0

    def peek(self) -> Steps[str]:
        """Returns the next character without reading it, or "" at the end."""
        while not self.waiting:
            if self.ended:
                return ""
            yield MORE
        return self._text[self._at]

    def until(self, found: Markers, write: Callable[[str], Part | None]) -> Steps[str]:
        """Reads past the next marker and returns it, or "" at the end. ``write`` gets the text before it."""
        while True:
            match = found.search(self._text, self._at)
            unsure = 0 if match else self._unsure(found)
            if text := self._take(match.start() if match else len(self._text) - unsure):
                yield write(text)
            if match:
                return self._take(match.end())
            if self.ended:
                self._take(len(self._text))
                return ""
            yield MORE

    def either(self, *texts: str) -> Steps[str]:
        """Reads and returns the first of ``texts`` that comes next, or returns "" if none does.

        At the end of the reply, the beginning of one of ``texts`` is read too, and "" returned.
        """
        while True:
            rest = self._text[self._at : self._at + max(map(len, texts))]
            match = next((text for text in texts if rest.startswith(text) or text.startswith(rest)), None)
            if match is None:
                return ""
            if rest.startswith(match):
                return self._take(self._at + len(match))
            if self.ended:
                self._take(len(self._text))
                return ""
            yield MORE

    def run(self, pattern: re.Pattern[str], limit: int | None = None) -> Steps[str]:
        """Reads and returns up to ``limit`` characters that match ``pattern``, a repeated character class."""
        pieces: list[str] = []
        room = limit
        while True:
            stop = len(self._text) if room is None else min(len(self._text), self._at + room)
            match = pattern.match(self._text, self._at, stop)
            if piece := self._take(match.end() if match else self._at):
                pieces.append(piece)
                room = None if room is None else room - len(piece)
            if self.waiting or self.ended or room == 0:
                return "".join(pieces)
            yield MORE

    def space(self) -> Steps[str]:
        """Reads and returns white space."""
        return self.run(_SPACE)

    def advance(self, read: Callable[[str, int], int]) -> None:
        """Reads up to the position that ``read`` returns. It gets the available text and the current position."""
        self._take(read(self._text, self._at))

    def _unsure(self, found: Markers) -> int:
        """Returns how many characters at the end may begin a marker.

        Where the reply was cut off, a single character counts only inside a call.
        """
        if self.ended and not self.cut_off:
            return 0
        unsure = found.unsure(self._text, self._at)
        return 0 if self.ended and unsure == 1 and self._held is None else unsure

    def _take(self, end: int) -> str:
        text, self._at = self._text[self._at : end], end
        if self._held is not None and text:
            self._held.append(text)
        return text


_SPACE = re.compile(r"\s*")
