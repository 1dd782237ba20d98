"""Whether the token that a replay chose could have been chosen by another prefill chunking as well. Needs NumPy.

On a quantised model the logits depend a little on how many tokens are computed together. The undisturbed run decodes
token by token; a replay prefills what was delivered in chunks. So a greedy choice may turn where two tokens are almost
equally probable, and only there. How near is near is measured: the text is read in several chunkings, and the noise is
how far the difference of the two tokens' log-probabilities moves from one to another, at most, anywhere in the text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bench.report import Judge, NearTie
from exo.compare.engine import Engine
from exo.worker.runner_cuda.loading.loader import Loaded, load
from exo.worker.runner_cuda.score import log_probabilities

CHUNKINGS = (1, 8, 32, 64, 128)
"""Tokens computed together. The first is how the undisturbed run computes its text."""

Differences = npt.NDArray[np.float64]
"""Of two tokens' log-probabilities, in nats, by chunking and position."""


@dataclass(frozen=True, slots=True)
class Text:
    """Output of a stream that is not what was expected; ``others`` are what was expected instead, by position."""

    stream: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    others: Mapping[int, tuple[int, Judge]]


def judge_all(engine: Engine, texts: Sequence[Text]) -> list[NearTie]:
    """Every choice in these texts that another token could claim, on the model loaded once more in this process.

    Raises the runner's LoadError and EngineError.
    """
    if not texts:
        return []
    table = {**engine.load.table, "slots": 1}  # its cache then takes least; a slot does not change results
    loaded = load(engine.load.model_copy(update={"table": table}), lambda _: None, score=True)
    try:
        return [found for text in texts for found in _judge(loaded, text)]
    finally:
        loaded.free()


def _judge(loaded: Loaded, text: Text) -> list[NearTie]:
    """The expected differences, and wherever the model, reading token by token, ranks another token first.

    The latter would show a token lost or doubled in the middle of an output: what follows it is then no greedy choice.
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
    """``NearTie``'s gap, noise and noise here, from the ``differences``, shape (chunkings, positions)."""
    moves = differences.max(axis=0) - differences.min(axis=0)
    return abs(float(differences[0, position])), float(moves.max()), float(moves[position])


def _rows(loaded: Loaded, tokens: Sequence[int], chunking: int, n_prompt: int) -> npt.NDArray[np.float32]:
    """Log-probabilities of each token of the output and all its rivals, shape (len(tokens) - n_prompt, vocabulary)."""
    return log_probabilities(replace(loaded, chunk=min(chunking, loaded.chunk)), tuple(tokens))[n_prompt - 1 : -1]
