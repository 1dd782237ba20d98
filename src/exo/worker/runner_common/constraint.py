"""The restriction of the next token of a sequence: its grammar, the end of its reasoning, or both."""

from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from exo.worker.runner_common.grammar.guided_decoding import GrammarState, Mask
    from exo.worker.runner_common.reasoning_budget import ReasoningBudget


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
