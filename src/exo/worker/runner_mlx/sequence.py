"""One request's sequence inside the engine."""

from dataclasses import dataclass, field
from enum import Enum

from exo.worker.protocol.messages import SamplingParams
from exo.worker.runner_common.grammar.guided_decoding import Constraint


class Phase(Enum):
    """Where a sequence stands. Only ``Scheduler`` moves it, along ``NEXT``."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.PREFILL, Phase.DONE}),
    Phase.PREFILL: frozenset({Phase.DECODE, Phase.DONE}),
    Phase.DECODE: frozenset({Phase.DONE}),
    Phase.DONE: frozenset(),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens known and cells queued.

    Invariant: ``n_queued`` cells of ``slot`` hold, or will hold once the steps that are queued have run, the sequence's
    first tokens. While decoding ``n_queued`` is at most one more than the tokens known, since a step may be queued
    whose input token only the device knows yet.
    """

    id: str
    tokens: list[int]
    """Prompt, then output."""
    n_prompt: int
    n_limit: int
    """Length at which the sequence ends with finish reason "length": the request's limit or the context's."""
    sampling: SamplingParams
    forbidden: tuple[int, ...] = ()
    """Token ids that are never chosen (end-of-generation ids under ``ignore_eos``)."""
    constraint: Constraint | None = None
    """What the request's grammar allows next; has seen all of the output known."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n_told: int = 0
    """Tokens of the prompt whose log-probabilities have been told."""
    phase: Phase = Phase.WAITING
    slot: int = -1
    n_queued: int = 0
    n_prefill: int = field(init=False)
    """Tokens known at the beginning: the prompt, and what another runner delivered."""

    def __post_init__(self) -> None:
        self.n_prefill = len(self.tokens)

    def move(self, phase: Phase) -> None:
        """Enters ``phase``. Raises ValueError for a transition that is not in ``NEXT``."""
        if phase not in NEXT[self.phase]:
            raise ValueError(f"sequence {self.id} cannot go from {self.phase.value} to {phase.value}")
        self.phase = phase
