"""A runner's messages to the server."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, TypeAdapter

from exo.worker.protocol.messages import Message

KvLayout = Literal["split", "pool"]
"""Whether each slot has a KV cache of its own, as long as the context, or all slots share one of that length."""


class FimTokens(Message):
    """Texts of the control tokens for filling in the middle of a text; empty where a model has none."""

    prefix: str = ""
    suffix: str = ""
    middle: str = ""
    repository: str = ""
    """Precedes the name of a repository, before further files."""
    file: str = ""
    """Precedes each further file."""


RAM = "RAM"
"""The name of the processors' memory in ``Layout.layers``."""


class Capabilities(Message):
    """The abilities of this runner with this model."""

    engine: str
    engine_version: str
    backend: str
    """The card backend in use, such as "LlamaCppCuda"."""
    devices: tuple[str, ...] = ()
    context_length: int
    """The most tokens of one sequence, prompt and output together."""
    slots: int
    kv: KvLayout = "split"
    vocabulary: int
    grammar: bool = False
    logprobs: bool = False
    embeddings: bool = False
    rerank: bool = False
    vision: bool = False
    adapters: tuple[str, ...] = ()
    """The names of the adapters that ``Generate.adapters`` may have."""
    adapter_scales: bool = False
    """Whether a request may use several adapters, and give each a scale."""
    model_bytes: int = 0
    kv_type: str = ""
    """The number format of the KV cache, or those of keys and values; empty if it is the model's own."""
    layers: Mapping[str, int] = {}
    """The number of layers in each place, by the engine's account; see ``Layout.layers``."""
    experts_in_ram: int = 0
    """The number of layers on a device whose experts are in RAM, by the engine's account."""
    retried: str = ""
    """Why the model is loaded with ``Load.smaller``; empty if it is not."""
    chat_template: str | None = None
    """Jinja source, from the card or else from the model's file."""
    tool_template: str | None = None
    """The model's own template for requests with tools, if it has another one for them."""
    notes: tuple[str, ...] = ()
    """Notes for the user about the model's files, such as a fault that makes the output worse."""
    bos_token: str = ""
    eos_token: str = ""
    special_tokens: tuple[str, ...] = ()
    """Texts that tokenize to control tokens in ``special`` stretches."""
    special_ids: tuple[int, ...] = ()
    """Their token ids, in the same order."""
    fim: FimTokens = FimTokens()

    def template(self, *, tools: bool) -> str | None:
        """The chat template of a request with or without tools."""
        return self.tool_template or self.chat_template if tools else self.chat_template


class Layout(Message):
    """How a model is laid out if it is loaded in one way. Lengths and batches are in tokens."""

    context_length: int = Field(ge=1)
    """The most tokens of one sequence, prompt and output together."""
    slots: int = Field(ge=1)
    kv: KvLayout = "split"
    kv_type: str = ""
    """See ``Capabilities.kv_type``."""
    layers: Mapping[str, int] = {}
    """The number of layers in each place, "RAM" or a device; empty if the runner has one place only."""
    experts_in_ram: int = 0
    """The number of layers on a device whose experts are in RAM."""
    batch: int = 0
    """The most prompt tokens of a step; 0 if the runner does not say."""


class LoadOption(Message):
    """One way to load a model, and the bytes that it takes after the model has worked with a full context.

    Where RAM and a device's memory are the same, as on a Mac, a byte counts in both. NVIDIA devices have CUDA's names
    as this machine's processes see them: "CUDA0", "CUDA1".
    """

    settings: Mapping[str, JsonValue] = {}
    """Keys of the card's table, and their values for this option."""
    host: int = Field(ge=0)
    """Bytes of RAM."""
    device: int = Field(default=0, ge=0)
    """Bytes of the machine's first device, for an engine that uses only one."""
    devices: Mapping[str, Annotated[int, Field(ge=0)]] = {}
    """Bytes of devices that the runner names, in addition."""
    later_host: int = Field(default=0, ge=0)
    """The part of ``host`` that is allocated with the first request, not by loading."""
    later_device: int = Field(default=0, ge=0)
    """The same part of ``device``."""
    later_devices: Mapping[str, Annotated[int, Field(ge=0)]] = {}
    """The same part of ``devices``."""
    parts: Mapping[str, int] = {}
    """Bytes by purpose, such as "weights" and "KV cache"."""
    layout: Layout | None = None


class Estimated(Message):
    """The reply to ``Estimate``. A runner that cannot load the model sends ``Failed`` instead."""

    type: Literal["estimated"] = "estimated"
    choices: tuple[LoadOption, ...] = Field(min_length=1)
    """The best option first. There is only one if the card leaves nothing open."""
    enough: int = Field(default=0, ge=0)
    """The index of the option that justifies unloading other models. Better ones are for free memory only."""
    as_good: int = Field(default=0, ge=0)
    """The number of options behind ``enough`` that are as good: free memory is used for them, too, before others are
    unloaded."""
    remedies: tuple[LoadOption, ...] = ()
    """Other settings that take less memory. For each setting, the smallest change comes first."""
    longer: tuple[LoadOption, ...] = ()
    """Contexts with a smaller type of KV cache, the longest first, which the user may prefer."""
    trained: int = Field(default=0, ge=0)
    """Tokens of context that the model was trained for; 0 if the runner does not say."""
    longest_because: str = ""
    """Why the first option has less context than the model was trained for, if memory is not the reason."""
    notes: tuple[str, ...] = ()
    """See ``Capabilities.notes``."""

    def smaller(self, option: LoadOption) -> Iterator[LoadOption]:
        """The choices behind one that has run out of memory which take clearly less where it computes, the best first.

        It computes on its devices, or in RAM without any.
        """
        most = {name: size * _CLEARLY_LESS for name, size in option.devices.items()}
        for each in self.choices[self.choices.index(option) + 1 :]:
            less = all(size <= most.get(name, size) for name, size in each.devices.items())
            first = each.device <= option.device * _CLEARLY_LESS
            computes = bool(option.devices or option.device)
            if (less and first) if computes else each.host <= option.host * _CLEARLY_LESS:
                yield each


_CLEARLY_LESS = 0.9


RunnerState = Literal[
    "Idle", "Loading", "Loaded", "WarmingUp", "Ready", "Running", "ShuttingDown", "Shutdown", "Failed"
]


class Status(Message):
    """The runner's state, with upstream's names. ``capabilities`` come with the first "Ready", and only then.

    "Running" while a request is in flight, "Ready" again when none is.
    """

    type: Literal["status"] = "status"
    state: RunnerState
    layers_loaded: int = 0
    total_layers: int = 0
    capabilities: Capabilities | None = None


class PrefillProgress(Message):
    """Tokens computed so far, of the prompt and the tokens ``delivered`` before.

    The first one confirms the request and has ``processed`` 0.
    """

    type: Literal["prefill_progress"] = "prefill_progress"
    id: str
    processed: int
    total: int
    diverged_at: int | None = None
    """The index of the first token that differs from a cached prompt, if much of what follows is the same as there but
    has to be computed again. Each index is told once."""


class Logprob(Message):
    """One token in one place. ``bytes`` are its text, or a control token's name."""

    token: int
    bytes: tuple[int, ...]
    logprob: float | None
    """The natural logarithm of its probability before grammar, penalties, bias and temperature, at least -9999. None
    for the first token of a prompt, which follows nothing."""


class TokenLogprobs(Message):
    """A token and the most probable ones in its place, in descending order; the lowest id first among equals."""

    chosen: Logprob
    top: tuple[Logprob, ...] = ()


class PromptLogprobs(Message):
    """Log-probabilities of the prompt's tokens from index ``start`` on. The parts come in order, each index once."""

    type: Literal["prompt_logprobs"] = "prompt_logprobs"
    id: str
    start: int = Field(default=0, ge=0)
    items: tuple[TokenLogprobs, ...]


class Delta(Message):
    """New tokens of one sequence, and the text that they release. Text may be held back, so it can be empty."""

    id: str
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, if requested."""


class Deltas(Message):
    """All sequences that advanced in one step."""

    type: Literal["deltas"] = "deltas"
    items: tuple[Delta, ...]


FinishReason = Literal["stop", "length", "cancelled"]


class Usage(Message):
    """Counts of tokens. ``cached_tokens`` are those of the prompt that were not computed again.

    ``drafted_tokens`` are this runner's guesses of output tokens, of which ``accepted_tokens`` were right.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Finished(Message):
    """Terminal. ``text`` was still held back. ``stop`` is the stop string that matched; it is never part of the text.

    ``completion_tokens`` counts every token up to the last one delivered, including an end-of-generation token.
    """

    type: Literal["finished"] = "finished"
    id: str
    reason: FinishReason
    usage: Usage
    text: str = ""
    stop: str | None = None


class Embedded(Message):
    """Terminal. The vector of a text, of Euclidean length 1. All texts have vectors of the same size."""

    type: Literal["embedded"] = "embedded"
    id: str
    vector: tuple[float, ...]
    usage: Usage


class Ranked(Message):
    """Terminal. ``score`` is on the model's own scale: only the order of scores means something."""

    type: Literal["ranked"] = "ranked"
    id: str
    score: float
    usage: Usage


class Tokenized(Message):
    """Tokens, each with its bytes of text, or a control token's name. Terminal unless there is ``more``."""

    type: Literal["tokenized"] = "tokenized"
    id: str
    more: bool = False
    tokens: tuple[int, ...]
    bytes: tuple[tuple[int, ...], ...]


def _cut(message: str) -> str:
    return message if len(message) <= _MESSAGE_LENGTH else f"{message[: _MESSAGE_LENGTH - 3]}..."


_MESSAGE_LENGTH = 4000

ErrorCode = Literal[
    "invalid_request",
    "context_length_exceeded",
    "model_not_found",
    "model_misconfigured",
    "model_load_failed",
    "out_of_memory",
    "engine_error",
    "runner_died",
    "shutdown",
]


class Failed(Message):
    """Terminal for request ``id``; without an id, for the runner itself. ``param`` is the request's field at fault.

    A message may quote the request, so a long one is cut.
    """

    type: Literal["failed"] = "failed"
    id: str | None = None
    code: ErrorCode
    message: Annotated[str, AfterValidator(_cut)]
    param: str | None = None
    prompt_tokens: int = Field(default=0, ge=0)
    """With ``context_length_exceeded``, the tokens of the prompt."""
    context_length: int = Field(default=0, ge=0)
    """With ``context_length_exceeded``, the most tokens that the prompt and its output may have together."""


class CpuUse(Message):
    """A runner's use of the CPU, and its loss to other programs."""

    threads: int = Field(ge=1)
    """Threads for a step of one row."""
    reason: str
    """Why that number, as a phrase that follows it."""
    delay: float = Field(ge=0, le=1)
    """Share of the time in which the computing threads waited for a core."""
    slowdown: float = Field(ge=0)
    """A step's duration, as a multiple of that on a quiet machine."""


class PrefixUse(Message):
    """The prompts that a runner has begun, and the prefixes that it had from earlier ones."""

    prompts: int = Field(ge=0)
    from_slots: int = Field(ge=0)
    """The number of prompts with a prefix in a slot; the next two are those with one in RAM and on disk."""
    from_ram: int = Field(ge=0)
    from_disk: int = Field(ge=0)
    tokens: int = Field(ge=0)
    """Tokens that were not computed again."""
    ram_bytes: int = Field(ge=0)
    """RAM that prefixes take which are in no slot. Checkpoints are included."""
    disk_bytes: int = Field(ge=0)
    """Disk that prefixes of this model with these settings take."""
    diverged_at: int | None = None
    """The length of the prefix that the last prompt shares with a cached one whose rest it mostly repeats."""


class Heartbeat(Message):
    """Sent about once a second. ``steps`` counts the loop's steps: if it stands still in a busy runner, that is stuck.

    During an estimate or a load, ``cpu_seconds`` and ``bytes_read`` are totals of the process and its children since
    its start. If they stand still and no new status comes, the load is stuck.
    """

    type: Literal["heartbeat"] = "heartbeat"
    steps: int
    active: int
    waiting: int
    cpu_seconds: float = 0.0
    """Without those of the thread that sends heartbeats."""
    bytes_read: int = 0
    cpu: CpuUse | None = None
    """None from a runner that does not compute on the CPU, or cannot measure it."""
    prefixes: PrefixUse | None = None
    """None from a runner that does not count this."""


Event = Annotated[
    Estimated
    | Status
    | PrefillProgress
    | PromptLogprobs
    | Deltas
    | Finished
    | Embedded
    | Ranked
    | Tokenized
    | Failed
    | Heartbeat,
    Field(discriminator="type"),
]
EVENTS: TypeAdapter[Event] = TypeAdapter(Event)
