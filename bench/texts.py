"""Compares the texts of streams under faults with those without: lost and doubled tokens, and near-ties. Needs NumPy.

The logits of a quantised model depend slightly on the number of tokens computed together. The undisturbed run decodes
token by token; a replay prefills the delivered tokens in chunks. A greedy choice may therefore differ where two tokens
are almost equally probable. How close they must be is measured: the text is read in several chunkings, and the noise is
the largest change of the difference of the two log-probabilities anywhere in the text.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from bench.streams import WatchedStream
from bench.target import STREAMS, FaultTarget
from exo.bench.client import Client
from exo.compare.engine import ComparedEngine
from exo.worker.runner_cuda.loading.loader import Loaded, load
from exo.worker.runner_cuda.score import log_probabilities

_LONGEST_SHIFT = 4096
_WINDOW = 12
"""Tokens that must agree after a shift, unless a sequence ends before."""
CHUNKINGS = (1, 8, 32, 64, 128)
"""Tokens computed together. The undisturbed run computes its text with the first."""

Differences = npt.NDArray[np.float64]
"""Differences of two tokens' log-probabilities, in nats, by chunking and position."""
Judge = Literal["undisturbed run", "continuation", "reading"]
"""The run without faults, a request that continues from a cut, or the model that reads the text token by token."""


class NearTie(BaseModel):
    """A choice after ``position`` tokens of output: the ``expected`` token and the one that came."""

    model_config = ConfigDict(frozen=True)

    stream: int
    position: int
    expected: int
    got: int
    by: Judge
    """The source of the expected token."""
    gap: float
    """The difference of the log-probabilities at the choice in nats, computed token by token."""
    noise: float
    """The largest change of this difference between two chunkings, over all positions of the text."""
    noise_here: float
    """The change at the position of the choice alone."""

    @property
    def within_noise(self) -> bool:
        """Whether rounding explains the choice."""
        return self.gap <= self.noise


@dataclass(frozen=True, slots=True)
class Alignment:
    """``lost`` tokens were expected and did not come; ``doubled`` ones came and were not expected.

    ``changed_at`` is the position in ``got`` after which the texts have nothing in common, or None.
    """

    lost: int = 0
    doubled: int = 0
    changed_at: int | None = None

    @property
    def identical(self) -> bool:
        """Whether there is no difference."""
        return self == Alignment()


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """The first position at which the sequences differ or one ends; None if they are equal."""
    for position, (one, two) in enumerate(zip(expected, got, strict=False)):
        if one != two:
            return position
    return None if len(expected) == len(got) else min(len(expected), len(got))


def align(expected: Sequence[int], got: Sequence[int]) -> Alignment:
    """Aligns the sequences: at each difference, finds the smallest shift after which they agree again."""
    expected, got = tuple(expected), tuple(got)
    lost = doubled = at = to = 0
    while True:
        step = first_difference(expected[at:], got[to:])
        if step is None:
            return Alignment(lost, doubled)
        at, to = at + step, to + step
        if at == len(expected) or to == len(got):
            return Alignment(lost + len(expected) - at, doubled + len(got) - to)
        for shift in range(1, _LONGEST_SHIFT):
            if _agree(expected, at + shift, got, to):
                lost, at = lost + shift, at + shift
                break
            if _agree(expected, at, got, to + shift):
                doubled, to = doubled + shift, to + shift
                break
        else:
            return Alignment(lost, doubled, changed_at=to)


def _agree(expected: tuple[int, ...], at: int, got: tuple[int, ...], to: int) -> bool:
    """Whether both continue alike. If one ends within the window, the other must end there too."""
    one, two = expected[at : at + _WINDOW], got[to : to + _WINDOW]
    return len(one) > 0 and one == two


@dataclass(frozen=True, slots=True)
class Continuation:
    """The tokens from ``start`` to ``stop`` of a stream, generated without a fault."""

    stream: WatchedStream
    start: int
    stop: int
    ids: tuple[int, ...]

    def difference(self) -> tuple[int, int] | None:
        """The first position of the stream with another token, and the token of this continuation."""
        at = first_difference(self.ids, self.stream.ids[self.start : self.stop])
        return None if at is None or at >= len(self.ids) else (self.start + at, self.ids[at])


async def continuations(client: Client, target: FaultTarget, streams: Sequence[WatchedStream]) -> list[Continuation]:
    """One for each cut of ``streams`` after the first token. The prompts are token ids."""
    turns = asyncio.Semaphore(STREAMS)

    async def ask(stream: WatchedStream, start: int, stop: int) -> Continuation:
        async with turns:
            again = WatchedStream(stream.number, stop - start)
            prompt = (*target.ids(stream.number), *stream.ids[:start])
            await again.read(client, {**target.body(stream.number), "prompt": prompt})
        return Continuation(stream, start, stop, tuple(again.ids))

    spans = [(stream, start, stop) for stream in streams for start, stop in _spans(stream)]
    return await asyncio.gather(*(ask(*span) for span in spans))


def _spans(stream: WatchedStream) -> Iterator[tuple[int, int]]:
    """The spans from each cut to the next one or the end."""
    starts = sorted({cut.at for cut in stream.cuts})
    for start, stop in pairwise([*starts, len(stream.ids)]):
        if start < stop:
            yield start, stop


@dataclass(frozen=True, slots=True)
class UnexpectedText:
    """An unexpected output of a stream. ``others`` are the expected tokens by position."""

    stream: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    others: Mapping[int, tuple[int, Judge]]


def judge_all(engine: ComparedEngine, texts: Sequence[UnexpectedText]) -> list[NearTie]:
    """Every choice in these texts for which another token was expected. Loads the model in this process.

    Raises the runner's LoadError and EngineError.
    """
    if not texts:
        return []
    table = {**engine.load.table, "slots": 1}  # takes the least memory; the number of slots does not change results
    loaded = load(engine.load.model_copy(update={"table": table}), lambda _: None, score=True)
    try:
        return [found for text in texts for found in _judge(loaded, text)]
    finally:
        loaded.free()


def _judge(loaded: Loaded, text: UnexpectedText) -> list[NearTie]:
    """Judges the expected differences, and positions where the model, reading token by token, prefers another token.

    The latter reveal a token that was lost or doubled inside an output: the next token is then no greedy choice.
    """
    tokens = (*text.prompt, *text.output)
    first, *rest = CHUNKINGS
    rows = _rows(loaded, tokens, first, len(text.prompt))
    choices = dict(text.others)
    for position, (top, got) in enumerate(zip(rows.argmax(axis=1).tolist(), text.output, strict=True)):
        if top != got:
            choices.setdefault(position, (top, "reading"))
    columns = sorted({*(token for token, _ in choices.values()), *(text.output[position] for position in choices)})
    read = [rows[:, columns]]
    del rows
    read += [_rows(loaded, tokens, chunking, len(text.prompt))[:, columns] for chunking in rest]
    table = np.stack(read).astype(np.float64)
    found: list[NearTie] = []
    for position, (expected, by) in sorted(choices.items()):
        got = text.output[position]
        differences = table[:, :, columns.index(expected)] - table[:, :, columns.index(got)]
        gap, noise, here = gap_and_noise(differences, position)
        tie = NearTie(
            stream=text.stream,
            position=position,
            expected=expected,
            got=got,
            by=by,
            gap=gap,
            noise=noise,
            noise_here=here,
        )
        found.append(tie)
    return found


def gap_and_noise(differences: Differences, position: int) -> tuple[float, float, float]:
    """The gap, noise and noise here of a ``NearTie``, from ``differences`` of shape (chunkings, positions)."""
    moves = differences.max(axis=0) - differences.min(axis=0)
    return abs(float(differences[0, position])), float(moves.max()), float(moves[position])


def _rows(loaded: Loaded, tokens: Sequence[int], chunking: int, n_prompt: int) -> npt.NDArray[np.float32]:
    """Log-probabilities at each position of the output, shape (len(tokens) - n_prompt, vocabulary)."""
    return log_probabilities(replace(loaded, chunk=min(chunking, loaded.chunk)), tuple(tokens))[n_prompt - 1 : -1]
