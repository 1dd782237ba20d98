"""Guesses how a sequence goes on from what it has said before, and how far guesses are to be trusted.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023) as a draft for speculative decoding. The sampler chooses each
token as it would without a draft, from the logits in its place; a guess only decides whether they are there already.
"""

from collections.abc import Sequence

NGRAM = 3
"""Tokens that must have stood together before for what followed them to be a guess."""
LONGEST = 16
"""Tokens of a draft."""
_KEPT = 0.9
"""Of the hits and misses before, at each new one."""
_RECOVERED = 0.005
"""Of the way back to what a rate began with, in one go."""


HOPE = 0.75
"""The share of a draft model's guesses that is taken to be right before any were made."""


class Rate:
    """How often late guesses were right."""

    def __init__(self, hope: float, tries: float) -> None:
        """``hope`` is the share of right ones to begin with, which counts as so many ``tries``."""
        self._hope = hope
        self._hits, self._tries = hope * tries, tries

    @property
    def share(self) -> float:
        """Of guesses that were right."""
        return self._hits / self._tries

    def seen(self, *, hit: bool) -> None:
        """Notes one guess."""
        self._hits = _KEPT * self._hits + hit
        self._tries = _KEPT * self._tries + 1

    def recover(self) -> None:
        """Goes back a little, for each token not guessed: what is not tried any more would never be tried again."""
        self._hits += _RECOVERED * (self._hope * self._tries - self._hits)


class Drafter:
    """Follows one sequence, with drafts or without: a guess is compared with what came either way."""

    def __init__(self, n_prompt: int) -> None:
        """Guesses are counted from the token after the prompt on."""
        self.rate = Rate(0.0, 1.0)
        self._n_prompt = n_prompt
        self._n_followed = 0
        self._followed_by: dict[tuple[int, ...], int] = {}
        """Where the token stands that came after an n-gram the last time."""
        self._guess: int | None = None
        """Where the token stands that is guessed to come next; those that follow it there come after it."""

    @property
    def guesses(self) -> bool:
        """Whether there is a guess now."""
        return self._guess is not None

    def follow(self, tokens: Sequence[int]) -> None:
        """Takes note of what has come since the last time; ``tokens`` are prompt and output."""
        for position in range(self._n_followed, len(tokens)):
            if self._guess is not None:
                hit = tokens[self._guess] == tokens[position]
                if position >= self._n_prompt:
                    self.rate.seen(hit=hit)
                self._guess = self._guess + 1 if hit else None
            if position + 1 >= NGRAM:
                ngram = tuple(tokens[position + 1 - NGRAM : position + 1])
                if self._guess is None:
                    self._guess = self._followed_by.get(ngram)
                self._followed_by[ngram] = position + 1
        self._n_followed = len(tokens)

    def draft(self, tokens: Sequence[int], size: int) -> list[int]:
        """The next ``size`` tokens as guessed; none where nothing is. Text that repeats itself goes on doing so."""
        if self._guess is None:
            return []
        guessed = list(tokens[self._guess : self._guess + size])
        period = len(guessed)
        while len(guessed) < size:
            guessed.append(guessed[-period])
        return guessed
