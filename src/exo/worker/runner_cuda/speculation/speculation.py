"""The speculation policy: whether a step verifies drafts, their length and their source. Pure.

Drafts never change which tokens are sampled, except by rounding. With "auto", a draft is used only if the measured step
times and the rates of right guesses promise more tokens a second by a margin of ``_GAIN``.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

from exo.worker.runner_cuda.loading.options import Speculate
from exo.worker.runner_cuda.sequence import Sequence as Stream
from exo.worker.runner_cuda.speculation.ngram_drafter import LONGEST, Drafter

Source = Literal["lookup", "model"]
"""The source of drafts: earlier text of the same sequence, or a draft model or head."""

_SIZES = (1, 2, 4, 8, LONGEST)
_GAIN = 1.1
"""How many times as fast drafts must promise to be."""
_LATE, _ENOUGH = 4, 2
"""The number of recent measurements kept of each step size, and the number that makes them count."""
_TRUSTED = 0.998
"""Each step multiplies the times of larger steps by this, so that they are tried again: the machine's load changes."""


class Guesser(Protocol):
    """A draft model (``model_drafter.DraftModel``), or a model's own head (``head_drafter.HeadDrafter``)."""

    @property
    def longest(self) -> int:
        """The most tokens of a draft."""
        ...

    @property
    def seconds(self) -> float:
        """The time of one more token in each draft of a step; 0 until measured."""
        ...

    def catch_up(self, streams: Sequence[Stream]) -> bool:
        """Computes some of the sequences' missing tokens, if there are many. Returns whether it is ready to guess."""
        ...

    def draft(self, streams: Sequence[Stream], size: int) -> list[list[int]]:
        """Returns up to ``size`` guesses for each sequence. The sequences are in ascending order of slot."""
        ...


class StepTimes:
    """Seconds of a decode step by its rows: the minimum of recent measurements, because disturbances only add time."""

    def __init__(self) -> None:
        self._late: dict[int, deque[float]] = {}
        self._trust: dict[int, float] = {}

    def measured(self, n_rows: int, seconds: float) -> None:
        """Notes a decode step."""
        for n, trust in self._trust.items():
            self._trust[n] = trust * _TRUSTED if n > n_rows else trust
        self._late.setdefault(n_rows, deque(maxlen=_LATE)).append(seconds)
        self._trust[n_rows] = 1.0

    def __call__(self, n_rows: int) -> float:
        """Returns the time of the nearest measured step with at most ``n_rows``, or else of the smallest one.

        A larger step that was never measured thus looks cheap and gets tried. Before any measurement it is 0.
        """
        known = [n for n, late in self._late.items() if len(late) >= _ENOUGH]
        if not known:
            return 0.0
        nearest = max((n for n in known if n <= n_rows), default=min(known))
        return self._trust[nearest] * min(self._late[nearest])


class Speculation:
    """Makes drafts of equal length for all decoding sequences of a step, or for none.

    llama.cpp computes the rows of several sequences together only as far as each has the same number.
    """

    def __init__(
        self, speculate: Speculate, n_rows: int = 0, model: Guesser | None = None, longest: int = LONGEST
    ) -> None:
        """``n_rows`` is the most rows of a step that may give logits, ``longest`` the most tokens of a draft."""
        self._speculate: Speculate = speculate
        self._seconds = StepTimes()
        self._n_rows = n_rows
        self._longest = min(longest, LONGEST)
        self._model = model
        self._source: Source = "lookup"  # the source of the last drafts

    def drafts(self, streams: Sequence[Stream]) -> list[list[int]]:
        """Returns a draft, perhaps empty, for each sequence of a step. They are in ascending order of slot."""
        none: list[list[int]] = [[] for _ in streams]
        if self._speculate == "off" or not streams:
            return none
        drafters = [_following(stream) for stream in streams]
        most = min(self._n_rows // len(streams) - 1, self._longest, *(s.n_limit - len(s.tokens) - 1 for s in streams))
        self._source, size = self._choose(streams, drafters, most)
        if self._model is not None and self._source == "model" and size:
            return self._model.draft(streams, size) if self._model.catch_up(streams) else none
        for stream in streams:
            stream.draft_rate.recover()
        return [drafter.draft(stream.tokens, size) for drafter, stream in zip(drafters, streams, strict=True)]

    def computed(self, n_rows: int, seconds: float) -> None:
        """Notes the time of a decode step."""
        if self._speculate == "auto":
            self._seconds.measured(n_rows, seconds)

    def verified(self, stream: Stream, n_true: int, *, missed: bool) -> None:
        """Notes that ``n_true`` guesses of a sequence's draft were right, and whether the next one was wrong."""
        if self._source == "model":
            for _ in range(n_true):
                stream.draft_rate.seen(hit=True)
            if missed:
                stream.draft_rate.seen(hit=False)

    def _choose(self, streams: Sequence[Stream], drafters: Sequence[Drafter], most: int) -> tuple[Source, int]:
        """Returns the source and the length of the drafts; length 0 if drafts do not pay."""
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
        """Yields each source that can guess now: its rate for each sequence, seconds per token, and longest draft."""
        if most > 0 and all(drafter.guesses for drafter in drafters):
            yield "lookup", [drafter.rate.share for drafter in drafters], 0.0, most
        sighted = any(stream.pictures for stream in streams)  # neither a draft model nor a head sees pictures
        if most > 0 and self._model is not None and not sighted:
            rates = [stream.draft_rate.share for stream in streams]
            yield "model", rates, self._model.seconds, min(most, self._model.longest)


def _expected(rate: float, size: int) -> float:
    """Returns the expected number of tokens of a step with a draft of ``size`` whose guesses are right at this rate.

    1 + p + ... + p^size (Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding",
    2023).
    """
    return sum(rate**power for power in range(size + 1))


def _following(stream: Stream) -> Drafter:
    if stream.drafter is None:
        stream.drafter = Drafter(stream.n_prompt)
    stream.drafter.follow(stream.tokens)
    return stream.drafter
