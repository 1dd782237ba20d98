"""One request's sequence inside the engine."""

from dataclasses import dataclass, field
from enum import Enum

from exo.worker.runner_common.grammar.guided_decoding import Constraint
from exo.worker.runner_cuda.sampling.sampler import Sampler
from exo.worker.runner_cuda.speculation.ngram_drafter import HOPE, Drafter, Rate


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
    """Tokens known and tokens computed.

    Invariant: ``tokens[:n_computed]`` are in the KV cache of ``slot``; while decoding exactly the last token is not.
    """

    id: str
    tokens: list[int]
    """Prompt, then output."""
    n_prompt: int
    n_prefill: int
    """Tokens known at the beginning: the prompt, and what another runner delivered."""
    n_limit: int
    """Length at which the sequence ends with finish reason "length": the request's limit or the context's."""
    sampler: Sampler
    constraint: Constraint | None = None
    """What the request's grammar allows next; has seen all of the output known."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    exact: bool = False
    """Whether the number of threads may not change its rounding."""
    drafter: Drafter | None = None
    """Made when it is first asked for a draft."""
    draft_rate: Rate = field(default_factory=lambda: Rate(HOPE, 4.0))
    """How often a draft model has guessed right."""
    phase: Phase = Phase.WAITING
    slot: int = -1
    n_computed: int = 0

    @property
    def n_missing(self) -> int:
        """Tokens known and not yet computed."""
        return len(self.tokens) - self.n_computed

    def move(self, phase: Phase) -> None:
        """Enters ``phase``. Raises ValueError for a transition that is not in ``NEXT``."""
        if phase not in NEXT[self.phase]:
            raise ValueError(f"sequence {self.id} cannot go from {self.phase.value} to {phase.value}")
        self.phase = phase
