"""Keeps text that looks like a special token literal.

A user who writes "<|im_end|>" must not end their turn with it. Before a chat template is rendered, every special token
in the user's strings is put between two marks. Afterwards the marks distinguish them from the special tokens that the
template itself wrote.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable
from functools import lru_cache
from os.path import commonprefix
from typing import overload

from pydantic import JsonValue

from exo.chat.template.render_main import CLOSE, OPEN
from exo.worker.protocol.commands import Text

_MARKS = re.compile(f"([{OPEN}{CLOSE}])")
_DEEPEST = 64


class NoncharacterError(ValueError):
    """The input contains one of the characters that serve as marks."""

    def __init__(self) -> None:
        super().__init__("the noncharacters U+FDD0 and U+FDD1 are not accepted in text")


class SpecialTokens:
    """Marks the special tokens of one vocabulary in text, and finds the marks again. Immutable."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._sorted = sorted({token for token in tokens if token})
        self._longest = max(map(len, self._sorted), default=0)
        self._any = re.compile(_pattern(self._sorted)) if self._sorted else None

    @overload
    def mark(self, value: str) -> str: ...
    @overload
    def mark(self, value: JsonValue) -> JsonValue: ...
    def mark(self, value: JsonValue) -> JsonValue:
        """Returns ``value`` with every special token in its strings between marks. Raises ``NoncharacterError``.

        The end of a string is marked too if a special token may begin there, since the template may put another of the
        user's strings next to it.
        """
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {self._mark_text(key): self.mark(item) for key, item in value.items()}
        return value

    def split(self, text: str) -> tuple[Text, ...]:
        """Splits the rendered text at the marks. A template may have lost or moved one of a pair."""
        stretches: list[Text] = []
        opened = False
        for piece in _MARKS.split(text):
            if piece in (OPEN, CLOSE):
                opened = piece == OPEN
            else:
                length = self._literal_length(piece) if opened else 0
                _append(stretches, piece[:length], special=False)
                _append(stretches, piece[length:], special=True)
        return tuple(stretches)

    def _mark_text(self, text: str) -> str:
        if OPEN in text or CLOSE in text:
            raise NoncharacterError
        if self._any is None:
            return text
        tail = self._tail(text)
        body = text[: len(text) - tail]
        marked = self._any.sub(lambda match: OPEN + match[0] + CLOSE, body)
        return marked + OPEN + text[len(body) :] + CLOSE if tail else marked

    def _tail(self, text: str) -> int:
        """Returns the length of the longest end of ``text`` that is a proper prefix of a special token."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if self._begins_token(text[-length:]):
                return length
        return 0

    def _begins_token(self, start: str) -> bool:
        at = bisect_left(self._sorted, start)
        return at < len(self._sorted) and self._sorted[at] != start and self._sorted[at].startswith(start)

    def _literal_length(self, piece: str) -> int:
        """Returns how much of the text after an opening mark was marked."""
        if self._begins_token(piece):
            return len(piece)
        match = self._any.match(piece) if self._any is not None else None
        return match.end() if match else 0


def _append(stretches: list[Text], text: str, *, special: bool) -> None:
    if not text:
        return
    if stretches and special and stretches[-1].special:
        text = stretches.pop().text + text
    stretches.append(Text(text=text, special=special))


def _pattern(tokens: list[str], depth: int = 0) -> str:
    """Returns a regular expression for the longest of ``tokens``, factored by common prefixes.

    A plain alternation of a thousand tokens that all begin with "<" would try each of them at every "<".
    """
    prefix = commonprefix(tokens)  # noqa: RUF071 - these are not paths
    by_next: dict[str, list[str]] = {}
    for token in tokens:
        if rest := token[len(prefix) :]:
            by_next.setdefault(rest[0], []).append(rest)
    if depth == _DEEPEST:
        branches = [re.escape(rest) for group in by_next.values() for rest in sorted(group, key=len, reverse=True)]
    else:
        branches = [_pattern(group, depth + 1) for group in by_next.values()]
    if not branches:
        return re.escape(prefix)
    optional = "?" if prefix in tokens else ""
    return re.escape(prefix) + f"(?:{'|'.join(branches)}){optional}"


@lru_cache(maxsize=32)
def special_tokens(tokens: tuple[str, ...]) -> SpecialTokens:
    """Returns the marks for a vocabulary's special tokens, compiled once."""
    return SpecialTokens(tokens)
