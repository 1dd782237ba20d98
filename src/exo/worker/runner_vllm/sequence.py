"""One request's sequence in the engine's loop and in the sampler."""

from dataclasses import dataclass, field
from typing import Any

from exo.worker.protocol.commands import SamplingParams
from exo.worker.runner_common.constraint import Constraint


@dataclass(slots=True, eq=False)
class Choice:
    """The sampler's data for one sequence, which go to the process that has the last layers.

    A ``constraint`` cannot go there: a runner whose model is spread over several processes has neither grammars nor
    limits of reasoning.
    """

    sampling: SamplingParams
    n_prompt: int
    """Tokens of the prompt. The tokens after it are output, of this runner or another."""
    ends: tuple[int, ...] = ()
    """Token ids that are not chosen before position ``ends_at``."""
    ends_at: int = 0
    constraint: Constraint | None = None
    """The restriction of the next token; has seen the whole output."""
    matched: bool = False
    """Set by the sampler if the grammar allows only an end, which the request ignores: no token was chosen."""
    wrong: str | None = None
    """Set by the sampler if the grammar cannot be continued: the reason."""

    @property
    def plain(self) -> bool:
        """Whether the token with the model's largest logit is chosen."""
        return self.sampling.temperature == 0 and not self.alters

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        sampling = self.sampling
        return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0)

    @property
    def biased(self) -> bool:
        """Whether some tokens are more or less probable than the model says."""
        return bool(self.sampling.logit_bias or self.sampling.allowed)

    @property
    def restricted(self) -> bool:
        """Whether a token may be excluded from the next place."""
        return self.constraint is not None and self.constraint.restricts()

    @property
    def alters(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return bool(self.penalised or self.biased or self.ends_at > self.n_prompt or self.restricted)


@dataclass(frozen=True, slots=True)
class Seen:
    """A prompt with pictures."""

    prompt: list[int]
    """Token ids, with -1 for each token of a picture."""
    tokens: list[int]
    """The ids that vLLM computes."""
    pictures: list[Any]
    """vLLM's description of each picture: tensors, digest and place."""


@dataclass(slots=True, eq=False)
class VllmSequence:
    """Prompt and output. The sequence ends with reason "length" when it has ``n_limit`` tokens."""

    id: str
    tokens: list[int]
    n_limit: int
    choice: Choice
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_prompt: bool = True
    adapter: str = ""
    pictures: list[Any] = field(default_factory=list[Any])
    """As ``Seen`` has them."""
    n_processed: int = 0
    """Tokens of the ``n_prefill`` that have been reported as computed."""
    n_prefill: int = field(init=False)
    """Tokens known at the beginning: the prompt, and those that another runner delivered."""

    def __post_init__(self) -> None:
        self.n_prefill = len(self.tokens)

    @property
    def constraint(self) -> Constraint | None:
        """The restriction of the next token."""
        return self.choice.constraint
