"""One request's sequence, as the engine's loop and the sampler see it."""

from dataclasses import dataclass, field

from exo.worker.protocol.messages import SamplingParams
from exo.worker.runner_common.grammar.guided_decoding import Constraint


@dataclass(slots=True, eq=False)
class Choice:
    """What the sampler needs to choose a sequence's tokens. Travels to the process that has the last layers.

    A ``constraint`` does not: a runner whose model is spread over several processes has no grammars.
    """

    sampling: SamplingParams
    n_prompt: int
    """Tokens of the prompt; those that follow it count as output, whichever runner generated them."""
    forbidden: tuple[int, ...] = ()
    """Token ids that are never chosen (end-of-generation ids under ``ignore_eos``)."""
    constraint: Constraint | None = None
    """What the request's grammar allows next; has seen all of the output known."""
    matched: bool = False
    """Set by the sampler where the grammar leaves nothing but an end, which is ignored: no token was chosen."""
    wrong: str | None = None
    """Set by the sampler where the grammar cannot be used any further."""

    @property
    def plain(self) -> bool:
        """Whether the largest of the model's own logits is the choice."""
        return self.sampling.temperature == 0 and not self.alters

    @property
    def penalised(self) -> bool:
        """Whether tokens known change the logits."""
        sampling = self.sampling
        return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0)

    @property
    def alters(self) -> bool:
        """Whether logits are changed before one is chosen."""
        return bool(self.penalised or self.sampling.logit_bias or self.forbidden or self.constraint is not None)


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens known: prompt, then output. ``n_limit`` is the length at which it ends with reason "length"."""

    id: str
    tokens: list[int]
    n_limit: int
    choice: Choice
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n_processed: int = 0
    """Of the tokens known at the beginning, those that were reported as computed."""
    n_prefill: int = field(init=False)
    """Tokens known at the beginning: the prompt, and what another runner delivered."""

    def __post_init__(self) -> None:
        self.n_prefill = len(self.tokens)
