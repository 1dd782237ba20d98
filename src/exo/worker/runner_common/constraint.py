"""The restriction of the next token of a sequence: its grammar, the end of its reasoning, or both."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, final

import numpy as np

from exo.worker.protocol.commands import ReasoningLimit

if TYPE_CHECKING:
    from exo.worker.runner_common.grammar.guided_decoding import GrammarState, Mask


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


@final
class Constraint:
    """The tokens that one sequence may continue with. For one thread at a time.

    A token that closes reasoning is the only one allowed, unless the grammar excludes it.
    """

    def __init__(self, n_vocab: int, grammar: "GrammarState | None", budget: "ReasoningBudget | None") -> None:
        """Both have seen the whole output. Raises GrammarError."""
        self._n_vocab = n_vocab
        self._grammar = grammar
        self._budget = budget
        self._forced = self._next_forced()

    @property
    def finished(self) -> bool:
        """Whether the output matches the grammar and only its end can follow."""
        return self._grammar is not None and self._grammar.finished

    @property
    def spared(self) -> bool:
        """Whether the next mask may be unnecessary."""
        return self._forced is not None or self._grammar is None or self._grammar.spared

    def restricts(self, tokens: int = 1) -> bool:
        """Whether it may exclude a token from one of the next ``tokens`` places."""
        return self._grammar is not None or (self._budget is not None and self._budget.may_force(tokens))

    def prepare(self) -> None:
        """Starts to compute the next mask in another thread, if the grammar decides and that has not begun."""
        if self._grammar is not None and self._forced is None:
            self._grammar.prepare()

    def mask(self) -> "Mask":
        """Returns an array of shape (n_vocab,), true for the tokens allowed next. Raises GrammarError."""
        if self._forced is not None:
            mask = np.zeros(self._n_vocab, np.bool_)
            mask[self._forced] = True
            return mask
        return np.ones(self._n_vocab, np.bool_) if self._grammar is None else self._grammar.mask()

    def allows(self, token: int) -> bool:
        """Whether ``token`` is allowed, without computing the mask unless that has begun. Raises GrammarError."""
        if self._forced is not None:
            return token == self._forced
        return self._grammar is None or self._grammar.allows(token)

    def accept(self, token: int) -> None:
        """Advances past a token. Raises GrammarError if the grammar does not allow it."""
        if self._grammar is not None:
            self._grammar.accept(token)
        if self._budget is not None:
            self._budget.accept(token)
        self._forced = self._next_forced()

    def _next_forced(self) -> int | None:
        forced = None if self._budget is None else self._budget.forced
        if forced is None or self._grammar is None:
            return forced
        return None if self._grammar.finished or not self._grammar.allows(forced) else forced
