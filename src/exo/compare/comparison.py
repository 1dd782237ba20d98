"""The result of a comparison, with everything that is needed to judge it."""

import platform
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, JsonValue

from exo.exit_code import CommandError
from exo.worker.host import Host

Mode = Literal["greedy", "seeded"]
MODES: tuple[Mode, ...] = get_args(Mode)


class CompareError(CommandError):
    """Two engines cannot be compared; the message names the engine and the cause."""


class _CompareFinding(BaseModel):
    """Infinite numbers, for tokens that only one engine rules out, are null in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HostFacts(_CompareFinding):
    """The machine. Memory is in bytes."""

    system: str
    processor: str
    cpu_count: int
    memory_total: int
    nvidia_devices: tuple[str, ...]

    @classmethod
    def of(cls, host: Host) -> Self:
        return cls(
            system=f"{host.system} {host.machine}",
            processor=host.processor or platform.machine(),
            cpu_count=host.cpu_count,
            memory_total=host.memory_total,
            nvidia_devices=tuple(device.name for device in host.nvidia_devices),
        )


class Speed(_CompareFinding):
    """Tokens and times of the runs that generated text, one stream at a time.

    Prefill lasts from sending a request to its first token and counts prompt tokens that no cache held; decode lasts
    from there to the last token. Times are taken when events are read from the runner's pipe.
    """

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float

    @property
    def prefill_rate(self) -> float | None:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None


class MemoryUse(_CompareFinding):
    """Bytes of the runner's process and its children. ``resident`` includes mapped files in memory."""

    resident_ready: int
    resident_peak: int
    """The largest of ten samples per second."""
    device_peak: int | None
    """On NVIDIA devices; None if the driver does not state it per process."""


class EngineReport(_CompareFinding):
    """One engine: its version, settings, speed and memory."""

    name: str
    engine: str
    version: str
    backend: str
    devices: tuple[str, ...]
    table: dict[str, JsonValue]
    """The model card's table for this runner, which names the weights."""
    settings: dict[str, str]
    """The settings that affect rounding, as the runner reports them."""
    model_bytes: int
    context_length: int
    vocabulary: int
    negative_log_likelihood: float | None
    """Nats per prompt token, without each prompt's first token; None if there are no others."""
    speed: Speed
    memory: MemoryUse


class PositionDivergence(_CompareFinding):
    """Divergence after the token at one position, over the ``sequences`` with that length."""

    position: int
    sequences: int
    max_abs: float
    mean_abs: float
    kl: float


class Divergence(_CompareFinding):
    """The differences of two engines' log-probabilities in nats, given the same tokens (teacher forcing).

    Differences are over every position and the whole vocabulary. KL is D(reference || other), in nats per position.
    """

    positions: int
    vocabulary: int
    """The number of token ids compared: the smaller vocabulary if they differ."""
    max_abs: float
    mean_abs: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    """The share of positions with the same most probable token."""
    by_position: tuple[PositionDivergence, ...]


class Difference(_CompareFinding):
    """A different choice of the other engine after the same text."""

    prompt: int
    position: int
    """The index of the generated token."""
    reference_token: int
    other_token: int
    margin: float
    """How far the reference was from choosing the other token when it read the text again: the difference of the two
    log-probabilities in nats, or of the two scores of a draw. Negative if reading in chunks instead of single tokens
    already changes the choice."""
    near_tie: bool
    """Whether the rounding of a quantised model explains the difference; see ``NEAR_TIE``."""


class TokenAgreement(_CompareFinding):
    """A token-by-token comparison of generated sequences, which all have the same length."""

    sequences: int
    identical: int
    tokens: int
    """The tokens of all sequences of one engine."""
    equal: int
    """Positions with equal tokens. Each engine continues from its own tokens, so a difference affects the rest."""
    chosen_alike: int
    """Tokens that the other engine also chose after the reference's text. The rest are ``differences``."""
    differences: tuple[Difference, ...]
    """In the order of prompts and positions."""


class TokenisationDifference(_CompareFinding):
    """A prompt that the two tokenizers split differently. It is scored with the reference's tokens."""

    prompt: int
    position: int
    """The index of the first different token."""
    reference_tokens: tuple[int, ...]
    other_tokens: tuple[int, ...]


class Pair(_CompareFinding):
    reference: str
    other: str
    tokenisation: tuple[TokenisationDifference, ...]
    divergence: Divergence
    greedy: TokenAgreement
    seeded: TokenAgreement


class Comparison(_CompareFinding):
    """One model on several engines. The first is the reference."""

    model_id: str
    quantization: str
    """The card's statement."""
    exo_version: str
    date: str
    """ISO 8601, UTC."""
    host: HostFacts
    prompts: tuple[str, ...]
    tokens: int
    """Generated per prompt, with end-of-generation tokens ruled out."""
    seed: int
    """The seed of the first prompt's run at temperature 1. Each further prompt's seed is one more."""
    engines: tuple[EngineReport, ...]
    pairs: tuple[Pair, ...]
