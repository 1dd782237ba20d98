"""Whether a step verifies drafts, how long they are and who makes them. Touches no library."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

from exo.worker.runner_cuda.loading.options import Speculate
from exo.worker.runner_cuda.sequence import Sequence as Stream
from exo.worker.runner_cuda.speculation.ngram_drafter import LONGEST, Drafter

Source = Literal["lookup", "model"]
"""What drafts are made from: text that came before, or a model's own guesses."""

_SIZES = (1, 2, 4, 8, LONGEST)
_GAIN = 1.1
"""How much faster a step with drafts must promise to be."""
_LATE, _ENOUGH = 4, 2
"""Measurements of a step's time that are kept, and that it takes to believe them."""
_TRUSTED = 0.998
"""What is left, with each step, of the time of steps with more rows: machines change, and so do their other tasks."""


class Guesser(Protocol):
    """A draft model. ``draft_model.DraftModel`` is one."""

    @property
    def longest(self) -> int:
        """Tokens of a draft at most."""
        ...

    @property
    def seconds(self) -> float:
        """That one more token of the drafts of a step takes; 0 until one was measured."""
        ...

    def catch_up(self, streams: Sequence[Stream]) -> bool:
        """Computes a part of what it lacks of these sequences, if that is much; whether it is ready to guess."""
        ...

    def draft(self, streams: Sequence[Stream], size: int) -> list[list[int]]:
        """The next ``size`` tokens of each sequence as it guesses, in ascending order of slot; sometimes fewer."""
        ...


class StepTimes:
    """Seconds of a step by its rows: the least of late measurements, since whatever disturbs one makes it longer."""

    def __init__(self) -> None:
        self._late: dict[int, deque[float]] = {}
        self._trust: dict[int, float] = {}

    def measured(self, n_rows: int, seconds: float) -> None:
        """Notes a step without prompts."""
        for n, trust in self._trust.items():
            self._trust[n] = trust * _TRUSTED if n > n_rows else trust
        self._late.setdefault(n_rows, deque(maxlen=_LATE)).append(seconds)
        self._trust[n_rows] = 1.0

    def __call__(self, n_rows: int) -> float:
        """As the most rows, up to so many, that were measured: so what never was is tried. 0: nothing was."""
        known = [n for n, late in self._late.items() if len(late) >= _ENOUGH]
        if not known:
            return 0.0
        nearest = max((n for n in known if n <= n_rows), default=min(known))
        return self._trust[nearest] * min(self._late[nearest])


class Speculation:
    """Drafts for every decoding sequence, each as long as the others, or for none.

    llama.cpp computes the rows of several sequences together only as far as each has as many.
    """

    def __init__(self, speculate: Speculate, n_rows: int = 0, model: Guesser | None = None) -> None:
        """``n_rows`` of a step at most may give logits."""
        self._speculate: Speculate = speculate
        self._seconds = StepTimes()
        self._n_rows = n_rows
        self._model = model
        self._source: Source = "lookup"
        """Of the last drafts."""

    def drafts(self, streams: Sequence[Stream]) -> list[list[int]]:
        """For the sequences of a step, in ascending order of slot."""
        none: list[list[int]] = [[] for _ in streams]
        if self._speculate == "off" or not streams:
            return none
        drafters = [_following(stream) for stream in streams]
        most = min(self._n_rows // len(streams) - 1, LONGEST, *(s.n_limit - len(s.tokens) - 1 for s in streams))
        self._source, size = self._choose(streams, drafters, most)
        if self._model is not None and self._source == "model" and size:
            return self._model.draft(streams, size) if self._model.catch_up(streams) else none
        for stream in streams:
            stream.draft_rate.recover()
        return [drafter.draft(stream.tokens, size) for drafter, stream in zip(drafters, streams, strict=True)]

    def computed(self, n_rows: int, seconds: float) -> None:
        """Notes how long a step of decoding sequences alone took."""
        if self._speculate == "auto":
            self._seconds.measured(n_rows, seconds)

    def verified(self, stream: Stream, n_true: int, *, missed: bool) -> None:
        """Notes of a draft how many tokens came true, and whether the next one did not."""
        if self._source == "model":
            for _ in range(n_true):
                stream.draft_rate.seen(hit=True)
            if missed:
                stream.draft_rate.seen(hit=False)

    def _choose(self, streams: Sequence[Stream], drafters: Sequence[Drafter], most: int) -> tuple[Source, int]:
        """Who makes the drafts, and how many tokens each is to have; 0: none is worth it."""
        sources = list(self._sources(streams, drafters, most))
        if isinstance(self._speculate, int):
            best = max(sources, key=lambda source: sum(source[1]), default=None)
            return (best[0], min(self._speculate, best[3])) if best is not None else ("lookup", 0)
        seconds, count = self._seconds, len(streams)
        chosen: tuple[Source, int] = "lookup", 0
        speed = _GAIN * count / max(seconds(count), 1e-9)
        for source, rates, cost, longest in sources:
            for size in _SIZES:
                if size > longest:
                    break
                took = seconds(count * (1 + size)) + size * cost
                if sum(_expected(rate, size) for rate in rates) / max(took, 1e-9) > speed:
                    chosen = source, size
                    speed = sum(_expected(rate, size) for rate in rates) / max(took, 1e-9)
        return chosen

    def _sources(
        self, streams: Sequence[Stream], drafters: Sequence[Drafter], most: int
    ) -> Iterator[tuple[Source, list[float], float, int]]:
        """Who can guess now, how often each sequence's guesses are right, a token's seconds, and how many at most."""
        if most > 0 and all(drafter.guesses for drafter in drafters):
            yield "lookup", [drafter.rate.share for drafter in drafters], 0.0, most
        if most > 0 and self._model is not None:
            rates = [stream.draft_rate.share for stream in streams]
            yield "model", rates, self._model.seconds, min(most, self._model.longest)


def _expected(rate: float, size: int) -> float:
    """Tokens that a step gives with a draft of ``size`` whose guesses are right at this rate.

    1 + p + ... + p^size (Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding",
    2023).
    """
    return sum(rate**power for power in range(size + 1))


def _following(stream: Stream) -> Drafter:
    if stream.drafter is None:
        stream.drafter = Drafter(stream.n_prompt)
    stream.drafter.follow(stream.tokens)
    return stream.drafter
