"""Closes the reasoning of a sequence once it is as long as its request allows."""

from collections.abc import Callable, Sequence
from typing import final

from exo.worker.protocol.commands import ReasoningLimit


@final
class ReasoningBudget:
    """Follows the output of one sequence, and tells the tokens that must be written to close its reasoning.

    The state depends on the output's tokens alone, so a replayed sequence continues as it would have. An end marker
    that the model itself has begun is left to the model.
    """

    def __init__(
        self,
        limit: ReasoningLimit,
        closing: Sequence[int],
        piece_of: Callable[[int], bytes],
        delivered: Sequence[int] = (),
    ) -> None:
        """``closing`` are the tokens of ``limit.closing``, ``delivered`` those of the output so far.

        ``piece_of`` returns the bytes of a token, or a control token's text.
        """
        self._limit = limit
        self._closing = closing
        self._piece_of = piece_of
        self._begin, self._end = limit.begin.strip().encode(), limit.end.strip().encode()
        self._inside = limit.inside
        self._may_begin = True
        """Whether reasoning may begin outside of it."""
        self._text = b""
        """The last bytes of the output, as far back as a marker may reach."""
        self._used = 0
        """Tokens of reasoning, without those that were written to close it."""
        self._written = 0
        """Tokens of ``closing`` that the output ends with, if they were forced and more of them follow."""
        for token in delivered:
            self.accept(token)

    @property
    def forced(self) -> int | None:
        """The token that must come next; None if the model chooses it."""
        if self._written:
            return self._closing[self._written]
        due = self._inside and self._used >= self._limit.max_tokens and not self._ends_soon
        return self._closing[0] if due and self._closing else None

    def may_force(self, tokens: int) -> bool:
        """Whether one of the next ``tokens`` tokens may be forced, whatever the model chooses before."""
        reasons = self._inside or self._may_begin
        return self._written > 0 or (reasons and self._used + tokens > self._limit.max_tokens)

    def accept(self, token: int) -> None:
        """Advances past a token. If it is not the one that was forced, something else forbade that one."""
        if self._inside and self.forced is None:
            self._used += 1
        self._written = self._written + 1 if token == self.forced else 0
        self._text += self._piece_of(token)
        self._read()
        if self._written and self._written == len(self._closing):
            self._written = 0
            self._inside = False

    @property
    def _ends_soon(self) -> bool:
        """Whether the output ends with the beginning of the end marker."""
        return any(self._text.endswith(self._end[:size]) for size in range(1, len(self._end)))

    def _read(self) -> None:
        """Reads the markers in the text."""
        while True:
            if self._inside or (self._may_begin and self._limit.anywhere):
                marker = self._end if self._inside else self._begin
                before, found, after = self._text.partition(marker)
                if not found:
                    self._text = before[max(0, len(before) - len(marker) + 1) :]
                    return
                self._text, self._inside = after, not self._inside
                continue
            self._text = self._text.lstrip() if self._may_begin else b""
            if not self._text:
                return
            if self._text.startswith(self._begin):
                self._text, self._inside = self._text[len(self._begin) :], True
            elif self._text.startswith(self._end):  # the prompt has ended the reasoning already
                self._text = self._text[len(self._end) :]
            elif self._begin.startswith(self._text) or self._end.startswith(self._text):
                return
            else:
                self._may_begin = False
