"""Reading text that arrives in pieces, by parsers that are generators.

A parser yields the parts it has read, and ``MORE`` where it cannot go on without more text; ``Scanner`` is what it
reads from. Each character is examined a bounded number of times: what cannot be decided yet is never longer than the
longest marker, and nothing is read more than a few times.
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
"""What a parser yields to wait for more text, or for the end."""
Steps = Generator[Part | _More | None, None, Result]
"""A parser, or a piece of one. It may also yield MORE, which means nothing."""


class Markers:
    """Texts to be found, none the beginning of another."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Immutable."""
        self.texts = tuple(texts)
        self._any = re.compile("|".join(map(re.escape, self.texts)) or "(?!)")
        self._beginnings = {text[:length] for text in self.texts for length in range(1, len(text))}
        self._longest = max(map(len, self.texts), default=1)

    def search(self, text: str, at: int) -> re.Match[str] | None:
        """The first marker in ``text`` from ``at`` on."""
        return self._any.search(text, at)

    def unsure(self, text: str, at: int) -> int:
        """How many characters at the end of ``text``, from ``at`` on, may be the beginning of a marker."""
        for length in range(min(self._longest - 1, len(text) - at), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0


@lru_cache(maxsize=64)
def markers(*texts: str) -> Markers:
    """The markers with these texts, made once."""
    return Markers(texts)


@final
class Scanner:
    """The text of one reply. What is read between ``hold`` and ``release`` can be had back as it stood."""

    def __init__(self) -> None:
        self.ended = False
        """No more text will come."""
        self.cut_off = False
        """Something other than the model ended the text."""
        self._text = ""
        self._at = 0
        self._held: list[str] | None = None

    @property
    def waiting(self) -> int:
        """Characters that came and are not read yet: fewer than the longest marker has, whenever more text is due."""
        return len(self._text) - self._at

    @property
    def at_end(self) -> bool:
        """Whether the whole reply has been read."""
        return self.ended and not self.waiting

    def feed(self, text: str) -> None:
        """More text."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self, *, cut_off: bool) -> None:
        """No more text will come."""
        self.ended = True
        self.cut_off = cut_off

    def hold(self, text: str = "") -> None:
        """From here on, remember what is read, after ``text``."""
        self._held = [text]

    def release(self) -> str:
        """What was read since ``hold``; it is remembered no longer."""
        held, self._held = self._held or [], None
        return "".join(held)

    def unread(self, text: str) -> None:
        """Puts back ``text``, which was the last to be read. A parser may do so a few times with each character."""
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
        """The next character, unread; empty at the end."""
        while not self.waiting:
            if self.ended:
                return ""
            yield MORE
        return self._text[self._at]

    def until(self, found: Markers, write: Callable[[str], Part | None]) -> Steps[str]:
        """Reads on behind the next marker and returns it; empty at the end. ``write`` gets the text before it."""
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
        """Reads that one of ``texts`` which comes next, the first of several, and returns it; else empty.

        The beginning of one at the end of a reply, which was cut off there, is read too, and nothing is returned.
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
        """Reads the characters that come next and match ``pattern`` one by one, at most ``limit``.

        ``pattern`` is a repeated class of characters.
        """
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
        """Reads the white space that comes next."""
        return self.run(_SPACE)

    def advance(self, read: Callable[[str, int], int]) -> None:
        """Reads as much of the text at hand as ``read`` does, which gets text and place and returns the next place."""
        self._take(read(self._text, self._at))

    def _unsure(self, found: Markers) -> int:
        """Characters at the end that may begin a marker. At a cut, one alone counts in a call only."""
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
