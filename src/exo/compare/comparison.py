"""What a comparison finds: the numbers, and everything that one must know to believe them."""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, JsonValue

Mode = Literal["greedy", "seeded"]
MODES: tuple[Mode, ...] = get_args(Mode)


class CompareError(Exception):
    """There is no comparison; the message says why and names the engine at fault."""


class _Finding(BaseModel):
    """Frozen. A number that is infinite, for a token that only one engine rules out, is null in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HostFacts(_Finding):
    """The machine that both engines ran on. Memory in bytes."""

    system: str
    processor: str
    cpu_count: int
    memory_total: int
    nvidia_devices: tuple[str, ...]


class Speed(_Finding):
    """Rates of one stream with nothing beside it, over the runs that generated text.

    Prefill is from sending a request to its first token, over the prompt's tokens that no cache held; decode is from
    there to the last token. Both are timed by the reader of the runner's pipe.
    """

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float

    @property
    def prefill_rate(self) -> float | None:
        """Tokens a second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None


class MemoryUse(_Finding):
    """Bytes of the runner's process and its children. ``resident`` counts mapped files that are in memory."""

    resident_ready: int
    resident_peak: int
    """The largest of samples ten times a second."""
    device_peak: int | None
    """On NVIDIA devices; None where the driver does not tell it by process."""


class EngineReport(_Finding):
    """One engine: what it is, how it was set up, and what it needs."""

    name: str
    """The runner's."""
    engine: str
    version: str
    backend: str
    devices: tuple[str, ...]
    table: dict[str, JsonValue]
    """The card's table for this runner, which names the weights."""
    settings: dict[str, str]
    """What rounding depends on, in the runner's own words."""
    model_bytes: int
    context_length: int
    vocabulary: int
    negative_log_likelihood: float | None
    """Of the prompts, in nats a token, over every token but each prompt's first; None if there is no other."""
    speed: Speed
    memory: MemoryUse


class PositionDivergence(_Finding):
    """Divergence after the token at one position, over the ``sequences`` that are so long."""

    position: int
    sequences: int
    max_abs: float
    mean_abs: float
    kl: float


class Divergence(_Finding):
    """How far apart two engines' log-probabilities (nats) are, given the same tokens (teacher forcing).

    Differences are over every position and the whole vocabulary. KL is D(reference || other), in nats a position.
    """

    positions: int
    vocabulary: int
    """Token ids compared: the smaller vocabulary where they differ."""
    max_abs: float
    mean_abs: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    """Share of positions where both find the same token most probable."""
    by_position: tuple[PositionDivergence, ...]


class Difference(_Finding):
    """A token that the other engine chose otherwise than the reference, having read the same."""

    prompt: int
    position: int
    """Of generated tokens, from 0."""
    reference_token: int
    other_token: int
    margin: float
    """How far the reference was from choosing the other token, when it read the text again: in nats, the gap of the two
    log-probabilities, or of the two scores of a draw; below 0 where reading in chunks instead of single tokens already
    turns the choice."""
    near_tie: bool
    """Whether the margin is so small that a quantisation's rounding explains the difference; see ``NEAR_TIE``."""


class TokenAgreement(_Finding):
    """Generated sequences, token by token. Every sequence has the same number of tokens."""

    sequences: int
    identical: int
    tokens: int
    """Of all sequences of one engine."""
    equal: int
    """Tokens at whose position both have the same, each engine going on from its own: one difference costs the rest."""
    chosen_alike: int
    """Tokens that the other engine also chose after reading the reference's text so far; the rest are differences."""
    differences: tuple[Difference, ...]
    """By prompt and position."""


class TokenisationDifference(_Finding):
    """A prompt of which the two tokenizers make different tokens. It is scored with the reference's."""

    prompt: int
    position: int
    """Of the first token that differs."""
    reference_tokens: tuple[int, ...]
    other_tokens: tuple[int, ...]


class Pair(_Finding):
    """The first engine, which is the reference, against another."""

    reference: str
    other: str
    tokenisation: tuple[TokenisationDifference, ...]
    divergence: Divergence
    greedy: TokenAgreement
    seeded: TokenAgreement


class Comparison(_Finding):
    """One model on several engines, the first of which is the reference for the others."""

    model_id: str
    quantization: str
    """By the card."""
    exo_version: str
    date: str
    """ISO 8601, UTC."""
    host: HostFacts
    prompts: tuple[str, ...]
    tokens: int
    """Generated for each prompt, end-of-generation tokens ruled out."""
    seed: int
    """Of the first prompt's seeded run, at temperature 1; each further prompt's is one more."""
    engines: tuple[EngineReport, ...]
    pairs: tuple[Pair, ...]
