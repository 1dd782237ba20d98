"""Text that looks like a special token, taken literally.

A user who writes "<|im_end|>" must not end their turn with it. Before a chat template is rendered, every such place in
the user's own strings is put between two marks; afterwards the marks tell those places from the special tokens that
the template itself wrote.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable
from functools import lru_cache
from typing import overload

from pydantic import JsonValue

from exo.chat.template.token_marks import CLOSE, OPEN
from exo.worker.protocol.messages import Text

_MARKS = re.compile(f"([{OPEN}{CLOSE}])")
_DEEPEST = 64


class NoncharacterError(ValueError):
    """The input holds one of the characters that serve as marks."""

    def __init__(self) -> None:
        super().__init__("the noncharacters U+FDD0 and U+FDD1 are not accepted in text")


class SpecialTokens:
    """Marks and finds again the special tokens of one vocabulary. Immutable."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._sorted = sorted({token for token in tokens if token})
        self._longest = max(map(len, self._sorted), default=0)
        self._any = re.compile(_pattern(self._sorted)) if self._sorted else None

    @overload
    def mark(self, value: str) -> str: ...
    @overload
    def mark(self, value: JsonValue) -> JsonValue: ...
    def mark(self, value: JsonValue) -> JsonValue:
        """The same value with every special token in its strings between marks. Raises ``NoncharacterError``.

        The end of a string is marked too where a special token might begin there: the template may put another of the
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
        """The rendered text as stretches without marks; a template may have lost or moved one of a pair."""
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
        """Length of the longest end of ``text`` that is the beginning of a special token but no whole one."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if self._begins_token(text[-length:]):
                return length
        return 0

    def _begins_token(self, start: str) -> bool:
        at = bisect_left(self._sorted, start)
        return at < len(self._sorted) and self._sorted[at] != start and self._sorted[at].startswith(start)

    def _literal_length(self, piece: str) -> int:
        """How much of the text after an opening mark was marked."""
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
    """A regular expression for the longest of ``tokens``, factored by common beginnings.

    A plain alternation of some thousand tokens that all begin with "<" would be tried whole at every "<".
    """
    prefix = _common_prefix(tokens)
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


def _common_prefix(tokens: list[str]) -> str:
    first, last = min(tokens), max(tokens)
    same = 0
    while same < len(first) and first[same] == last[same]:
        same += 1
    return first[:same]


@lru_cache(maxsize=32)
def special_tokens(tokens: tuple[str, ...]) -> SpecialTokens:
    """The marks for a vocabulary's special tokens, made once."""
    return SpecialTokens(tokens)
