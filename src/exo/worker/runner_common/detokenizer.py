"""Token bytes to text that may be shown: incremental UTF-8 and stop strings held back across token borders."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

_FIRST_MARK = 0xDC00
"""The first of the lone surrogates, which no decoded text contains."""


class Vocabulary(Protocol):
    """The bytes of a model's tokens."""

    def bytes_of(self, token: int) -> bytes:
        """Returns the bytes that a token adds to the text; none for control tokens."""
        ...

    def piece_of(self, token: int) -> bytes:
        """Returns the bytes that a token adds to the text, or the text of a control token."""
        ...

    def is_eog(self, token: int) -> bool:
        """Whether a token ends generation."""
        ...


class TextStream:
    """Turns the tokens of one sequence into text, ending at the first stop string or stop token.

    A stop string may name control tokens, which are not part of the text: one that is generated matches its name.

    Invariants: the pieces returned are always whole characters; no piece ever contains any part of a stop string that
    turns out to match; and the pieces depend only on the bytes pushed so far, not on how they were split, once
    ``finish`` has been called.
    """

    def __init__(
        self, stop: Sequence[str] = (), min_tokens: int = 0, stop_tokens: Iterable[int] = (), *, show_stop: bool = False
    ) -> None:
        """The first ``min_tokens`` tokens are no stop tokens, and no stop string is looked for in their text.

        With ``show_stop``, the text ends with the stop string or stop token instead of before it.
        """
        self._show_stop = show_stop
        self._stop_tokens = frozenset(stop_tokens)
        self._unstopped = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = {each: each for each in stop}
        """Stop strings by the text that is searched for: themselves, or with marks of the control tokens in them."""
        self._marks: dict[str, str] = {}
        """Marks of the control tokens that a stop string names, by name. A mark is added when its token first comes."""
        self._beginnings = frozenset("".join(each[:-1] for each in self._stop))
        """Characters in which the beginning of a stop string may end."""
        self._held = ""
        self.stopped_by: str | None = None
        """The stop string that has matched."""
        self._met_token = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string or a stop token has come."""
        return self._met_token or self.stopped_by is not None

    def take(self, token: int, vocabulary: Vocabulary, *, show_special: bool = False) -> str:
        """The text that a token releases. Control tokens are shown if ``show_special``, except at the end of a turn."""
        shown = vocabulary.piece_of if show_special else vocabulary.bytes_of
        data = b"" if vocabulary.is_eog(token) else shown(token)
        if self._unstopped:
            self._unstopped -= 1
            return self._decoder.decode(data)
        if token in self._stop_tokens:
            self._met_token = True
            return self.push(data) if self._show_stop and data else ""
        if data:
            return self.push(data)
        return self._push_control(vocabulary.piece_of(token).decode(errors="replace")) if self._stop else ""

    def push(self, data: bytes) -> str:
        """The text that ``data`` releases; empty once a stop string has matched."""
        return self._release(self._decoder.decode(data))

    def _push_control(self, name: str) -> str:
        if name not in self._marks:
            naming = {pattern: stop for pattern, stop in self._stop.items() if name and name in pattern}
            if not naming:
                return ""
            mark = self._marks[name] = chr(_FIRST_MARK + len(self._marks))
            self._stop |= {pattern.replace(name, mark): stop for pattern, stop in naming.items()}
            self._beginnings = frozenset("".join(each[:-1] for each in self._stop))
        return self._release(self._marks[name])

    def finish(self) -> str:
        """The text still held back when generation ends; an incomplete character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + self._without_marks(held)

    def _without_marks(self, text: str) -> str:
        return text.translate({ord(mark): None for mark in self._marks.values()}) if self._marks else text

    def _release(self, text: str) -> str:
        if self.stopped_by is not None or not (self._stop and text):
            return "" if self.stopped_by is not None else text
        text = self._held + text
        if match := self._first_match(text):
            start, end, self.stopped_by = match
            self._held = ""
            return self._without_marks(text[: end if self._show_stop else start])
        keep = self._possible_prefix(text)
        self._held = text[len(text) - keep :]
        return self._without_marks(text[: len(text) - keep])

    def _first_match(self, text: str) -> tuple[int, int, str] | None:
        """The match that ends first, as it would if the text came a character at a time; of those the longest.

        Returns its start, its end and the stop string.
        """
        found = [(at + len(each), at, stop) for each, stop in self._stop.items() if (at := text.find(each)) >= 0]
        if not found:
            return None
        end, start, stop = min(found)
        return start, end, stop

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
