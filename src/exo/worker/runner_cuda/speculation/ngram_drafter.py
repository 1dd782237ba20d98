"""Guesses the continuation of a sequence from its own earlier text, and measures how often guesses are right.

This is prompt lookup (Saxena, "Prompt Lookup Decoding", 2023) as a draft for speculative decoding. The sampler chooses
each token from its logits as it would without a draft. A right guess only means that the logits are there already.
"""

from collections.abc import Sequence
from itertools import takewhile

NGRAM = 3
"""The number of tokens that must occur again for the tokens after their last occurrence to become a guess."""
LONGEST = 16
"""The most tokens of a draft."""
_KEPT = 0.9
"""The weight of earlier guesses when a new one is added."""
_RECOVERED = 0.005
"""The share of the way back to a rate's initial value that one call of ``recover`` makes."""
HOPE = 0.75
"""The initial rate of a draft model's right guesses."""


class AcceptanceRate:
    """The share of recent guesses that were right."""

    def __init__(self, hope: float, tries: float) -> None:
        """``hope`` is the initial share, with the weight of ``tries`` guesses."""
        self._hope = hope
        self._hits, self._tries = hope * tries, tries

    @property
    def share(self) -> float:
        """The share, 0 to 1."""
        return self._hits / self._tries

    def seen(self, *, hit: bool) -> None:
        """Notes one guess."""
        self._hits = _KEPT * self._hits + hit
        self._tries = _KEPT * self._tries + 1

    def recover(self) -> None:
        """Moves the share towards its initial value. Call it for each token without a guess.

        A source with a low rate is not used, so its rate would otherwise stay low for ever.
        """
        self._hits += _RECOVERED * (self._hope * self._tries - self._hits)


class Drafter:
    """Follows one sequence. Its guesses are compared with the sampled tokens even if they are not verified."""

    def __init__(self, n_prompt: int) -> None:
        """The rate counts guesses from the token after the prompt on."""
        self.rate = AcceptanceRate(0.0, 1.0)
        self._n_prompt = n_prompt
        self._n_followed = 0
        self._followed_by: dict[tuple[int, ...], int] = {}  # by n-gram: the index of the token after its last place
        self._guess: int | None = None  # the index of an earlier token that is guessed to come next again

    @property
    def guesses(self) -> bool:
        """Whether there is a guess now."""
        return self._guess is not None

    def follow(self, tokens: Sequence[int]) -> None:
        """Takes the tokens that are new since the last call. ``tokens`` are the whole prompt and output."""
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
        """Returns guesses of the next ``size`` tokens, or none. A repetition at the end of the text is continued.

        A token that stands for a picture, whose id is negative, is no guess.
        """
        if self._guess is None:
            return []
        guessed = list(takewhile(lambda token: token >= 0, tokens[self._guess : self._guess + size]))
        period = len(guessed)
        while 0 < len(guessed) < size:
            guessed.append(guessed[-period])
        return guessed
