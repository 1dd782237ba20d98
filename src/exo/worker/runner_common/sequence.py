"""The part of a sequence's life that is the same in every engine: its phases, and the effect of a new token."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from exo.worker.protocol.commands import Generate
from exo.worker.protocol.events import Failed, FinishReason
from exo.worker.runner_common.detokenizer import Vocabulary

if TYPE_CHECKING:
    from exo.worker.runner_common.constraint import Constraint

NEVER = 1 << 62
"""A position that no sequence reaches."""


class Phase(Enum):
    """The phase of a sequence. Only its scheduler changes it."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"

    def then(self, phase: "Phase") -> "Phase":
        """Returns ``phase``. Raises ValueError if a sequence cannot enter it from this one."""
        if phase not in _NEXT[self]:
            raise ValueError(f"a sequence cannot go from {self.value} to {phase.value}")
        return phase


_NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.PREFILL, Phase.DONE}),
    Phase.PREFILL: frozenset({Phase.DECODE, Phase.WAITING, Phase.DONE}),
    Phase.DECODE: frozenset({Phase.WAITING, Phase.DONE}),
    Phase.DONE: frozenset(),
}


def ends_at(request: Generate, n_prompt: int) -> int:
    """Returns the position from which on a request's output may have an end-of-generation token."""
    return NEVER if request.ignore_eos else n_prompt + request.min_tokens


def adapter_name(request: Generate) -> str:
    """Returns the name of the only adapter that a request may have here; empty if it has none."""
    return request.adapters[0].name if request.adapters else ""


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns how many leading tokens two texts share."""
    differences = (at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differences, min(len(one), len(other)))


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities (natural logarithms) of one place, before grammar, penalties, bias and temperature.

    ``top`` are the most probable tokens there, in descending order, the lowest id first among equals.
    """

    chosen: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One new token, with a ``reason`` if it ends the sequence, and ``scores`` if the request wants them."""

    id: str
    token: int
    reason: FinishReason | None
    scores: Scores | None = None


class GeneratingSequence(Protocol):
    """The attributes of an engine's sequence that a new token affects."""

    id: str
    tokens: list[int]
    """Prompt, then output."""
    n_limit: int
    """Length at which the sequence ends with finish reason "length"."""

    @property
    def constraint(self) -> "Constraint | None":
        """The restriction of the next token; has seen the whole output."""
        ...


def append(sequence: GeneratingSequence, token: int, vocabulary: Vocabulary, scores: Scores | None = None) -> Sampled:
    """Appends a token to a sequence and tells its constraint. Raises GrammarError.

    The result has a finish reason if the sequence ends with the token. Otherwise the grammar's next mask is begun,
    unless it may be unnecessary.
    """
    sequence.tokens.append(token)
    is_eog, constraint = vocabulary.is_eog(token), sequence.constraint
    if constraint is not None and not is_eog:
        constraint.accept(token)
    reason: FinishReason | None = None
    if is_eog or (constraint is not None and constraint.finished):
        reason = "stop"
    elif len(sequence.tokens) >= sequence.n_limit:
        reason = "length"
    elif constraint is not None and not constraint.spared:
        constraint.prepare()
    return Sampled(sequence.id, token, reason, scores)


def not_finite(request: str) -> Failed:
    """Returns the terminal event of a request whose logits are not all finite."""
    message = "the model computed a logit that is not a number for this request"
    return Failed(id=request, code="engine_error", message=message)
