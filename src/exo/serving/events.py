"""The events of one request to generate text, in no API's form.

A stream has these in order: ``Routed`` and ``Loading`` until the model is loaded, ``Started``, then for each choice
``ChoiceStarted``, ``Prefill``, ``ChoicePrompt``, ``ChoiceDelta`` and one ``ChoiceFinished``, and last ``Completed``.
``Routed`` and ``Loading`` may also come later, when a runner has died. A request that fails raises ``ServingError``.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from exo.chat.output.events import Part
from exo.worker.protocol.commands import SamplingParams
from exo.worker.protocol.events import Capabilities, TokenLogprobs, Usage

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Routed:
    """The router has chosen a runner. ``reason`` is printable ASCII."""

    runner: str
    reason: str
    host: str = ""
    """The remote host that serves it; empty for this machine."""


@dataclass(frozen=True, slots=True)
class Loading:
    """The model is not loaded yet; ``note`` is the progress of its load or download."""

    note: str


@dataclass(frozen=True, slots=True)
class Started:
    """The model is loaded and gets the request. ``prompts`` are their texts if the reply begins with them."""

    model_id: str
    capabilities: Capabilities
    prompts: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=partial(SamplingParams, seed=0))
    """After the defaults of the model card."""
    quantization: str = ""
    """The card's name of the weights' number format."""


@dataclass(frozen=True, slots=True)
class ChoiceStarted:
    """A runner has accepted a choice. ``prompt_tokens`` is 0 if their number is not known yet."""

    choice: int
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Prefill:
    """``processed`` of ``total`` prompt tokens are computed."""

    choice: int
    processed: int
    total: int


@dataclass(frozen=True, slots=True)
class ChoicePrompt:
    """Log-probabilities of the prompt's tokens, from number ``start`` on."""

    choice: int
    start: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(slots=True)  # not frozen: a server makes thousands per second
class ChoiceDelta:
    """More of a choice. ``tokens`` and their ``logprobs``, if requested, may be ahead of the parts."""

    choice: int
    parts: tuple[Part, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """The end of a choice, with its last parts. ``stop`` is the stop string that ended it."""

    choice: int
    parts: tuple[Part, ...]
    reason: Reason
    stop: str | None
    usage: Usage
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completed:
    """Every choice has finished. ``usage`` is that of the whole request."""

    usage: Usage


GenerationEvent = (
    Routed | Loading | Started | ChoiceStarted | Prefill | ChoicePrompt | ChoiceDelta | ChoiceFinished | Completed
)
