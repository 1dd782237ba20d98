"""One request's sequence in the engine."""

from dataclasses import dataclass, field

from exo.worker.protocol.commands import SamplingParams
from exo.worker.runner_common.constraint import Constraint
from exo.worker.runner_common.sequence import Phase


@dataclass(slots=True, eq=False)
class MlxSequence:
    """The tokens known and the cells queued.

    Invariant: ``n_queued`` cells of ``slot`` hold the sequence's first tokens, or will after the queued steps. While
    decoding, ``n_queued`` exceeds the tokens known by at most one: only the device may know a queued step's input.
    """

    id: str
    tokens: list[int]
    """Prompt, then output."""
    n_prompt: int
    n_limit: int
    """Length at which the sequence ends with finish reason "length": the request's limit or the context's."""
    sampling: SamplingParams
    ends: tuple[int, ...] = ()
    """Token ids that are not chosen before position ``ends_at``."""
    ends_at: int = 0
    constraint: Constraint | None = None
    """The restriction of the next token; has seen the whole output."""
    adapter: int = 0
    """The number of the adapter that the sequence is computed with; 0 for none."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_prompt: bool = True
    n_told: int = 0
    """Tokens of the prompt whose log-probabilities have been reported."""
    phase: Phase = Phase.WAITING
    slot: int = -1
    n_queued: int = 0
    n_prefill: int = field(init=False)
    """Tokens known at the beginning: the prompt, and those that another runner delivered."""

    def __post_init__(self) -> None:
        self.n_prefill = len(self.tokens)

    @property
    def reads_cache(self) -> bool:
        """Whether cached tokens of its prompt need not be computed."""
        return self.cache_prompt and self.prompt_logprobs is None

    def move(self, phase: Phase) -> None:
        """Enters ``phase``. Raises ValueError for a transition that does not exist."""
        self.phase = self.phase.then(phase)
