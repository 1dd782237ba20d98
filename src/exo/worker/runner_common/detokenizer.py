"""Token bytes to text that may be shown: incremental UTF-8 and stop strings held back across token borders."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of one sequence's tokens into text, ending at the first stop string.

    Invariants: the pieces returned are always whole characters; no piece ever contains any part of a stop string that
    turns out to match; and the pieces depend only on the bytes pushed so far, not on how they were split, once
    ``finish`` has been called.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._beginnings = frozenset("".join(each[:-1] for each in self._stop))
        """Characters in which the beginning of a stop string may end."""
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, data: bytes) -> str:
        """The text that ``data`` releases; empty once a stop string has matched."""
        return self._release(self._decoder.decode(data))

    def finish(self) -> str:
        """The text still held back when generation ends; an incomplete character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if self.stopped_by is not None or not (self._stop and text):
            return "" if self.stopped_by is not None else text
        text = self._held + text
        if match := self._first_match(text):
            start, self.stopped_by = match
            self._held = ""
            return text[:start]
        keep = self._possible_prefix(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """The match that ends first, as it would if the text came a character at a time; of those the longest."""
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _possible_prefix(self, text: str) -> int:
        """How many characters at the end of ``text`` could be the beginning of a stop string."""
        longest = 0
        if text[-1] not in self._beginnings:
            return longest
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
