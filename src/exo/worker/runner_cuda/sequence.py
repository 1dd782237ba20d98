"""One request's sequence in the engine."""

from dataclasses import dataclass, field

from exo.worker.runner_common.constraint import Constraint
from exo.worker.runner_common.sequence import Phase
from exo.worker.runner_cuda.prefix.disk_tier import FileReading, StoredPrefix
from exo.worker.runner_cuda.prefix.host_tier import Saved
from exo.worker.runner_cuda.prefix.moved import Move
from exo.worker.runner_cuda.sampling.sampler import Sampler
from exo.worker.runner_cuda.speculation.ngram_drafter import HOPE, AcceptanceRate, Drafter
from exo.worker.runner_cuda.vision.span import Span, position_of, span_at, whole_length

USUAL_OUTPUT = 2048
"""The tokens of output for which a request that states no limit waits until a pool has room. Few chat messages have
more. An agent's request states its limit."""


@dataclass(slots=True, eq=False)
class Sequence:
    """The tokens known and those computed.

    Invariant: ``tokens[:n_computed]`` are in the KV cache of ``slot``; while decoding exactly the last token is not.
    """

    id: str
    tokens: list[int]
    """Prompt, then output."""
    n_prompt: int
    n_prefill: int
    """Tokens known at the beginning: the prompt, and those that another runner delivered."""
    n_limit: int
    """Length at which the sequence ends with finish reason "length": the request's limit or the context's."""
    sampler: Sampler
    is_open: bool = False
    """Whether the request states no limit, so that ``n_limit`` is the context's."""
    constraint: Constraint | None = None
    """The restriction of the next token; has seen the whole output."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_prompt: bool = True
    adapter: str = ""
    """The ``adapter_key`` of the adapters that the sequence is computed with; empty for none."""
    exact: bool = False
    """Whether the number of threads must not change its rounding."""
    drafter: Drafter | None = None
    """Made when it is first asked for a draft."""
    draft_rate: AcceptanceRate = field(default_factory=lambda: AcceptanceRate(HOPE, 4.0))
    """How often the guesses of a draft model or head were right."""
    pictures: list[Span] = field(default_factory=list[Span])
    """The tokens that stand for pictures, in ascending order."""
    boundaries: list[int] = field(default_factory=list[int])
    """The positions of control tokens in the prompt, between which messages are, in ascending order."""
    marks: list[int] = field(default_factory=list[int])
    """The lengths at which prefill stops for a checkpoint or a move, in ascending order."""
    moves: list[Move] = field(default_factory=list[Move])
    """The cells that are aside for it, in ascending order."""
    looked: bool = False
    """Whether the disk has been searched for a longer prefix than the slots and RAM have."""
    stored: StoredPrefix | None = None
    """The file to read before the sequence enters a slot."""
    reading: FileReading | None = None
    """The reading of that file, once it has begun."""
    parked: Saved | None = None
    """The state of a sequence that has left its slot for others and waits to go on."""
    alone: bool = False
    """Whether it must have the pool for itself, because the cells of one of several sequences spoil the others."""
    n_told: int = 0
    """The number of tokens whose computing has been told. They may be computed again, if the state was lost."""
    phase: Phase = Phase.WAITING
    slot: int = -1
    n_computed: int = 0

    @property
    def reads_cache(self) -> bool:
        """Whether cached tokens of its prompt need not be computed."""
        return self.cache_prompt and self.prompt_logprobs is None

    @property
    def n_missing(self) -> int:
        """Tokens known and not yet computed."""
        return len(self.tokens) - self.n_computed

    @property
    def n_wanted(self) -> int:
        """The cells of a pool for which the sequence waits before it enters a slot."""
        return min(self.n_limit, len(self.tokens) + USUAL_OUTPUT) if self.is_open else self.n_limit

    @property
    def picture(self) -> Span | None:
        """The picture whose tokens are computed next; None if they are text."""
        span = span_at(self.pictures, self.n_computed)
        return span if span is not None and span.start <= self.n_computed else None

    def edge(self, start: int) -> int:
        """Returns where the text or the part of a picture ends that has the token ``start``."""
        span = span_at(self.pictures, start)
        if span is None:
            return len(self.tokens)
        return span.start if start < span.start else span.stop

    def uncut(self, length: int) -> int:
        """Returns the most tokens, up to ``length``, after which a cached prefix may end."""
        return whole_length(self.pictures, length)

    def position(self, index: int) -> int:
        """Returns the position of a token of text, or of the first one of a part of a picture."""
        return position_of(self.pictures, index) if self.pictures else index

    def move(self, phase: Phase) -> None:
        """Enters ``phase``. Raises ValueError for a transition that does not exist."""
        self.phase = self.phase.then(phase)
