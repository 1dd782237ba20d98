"""The contract: every message between the server and a runner.

A runner is a program that reads one JSON object a line on standard input (``Command``) and writes one a line on
standard output (``Event``). What must hold is in ``tests/test_contract.py``, which runs against every runner:
``Ready`` or ``Failed`` comes before anything but an ``Estimate`` is accepted, and each request ends with exactly one
message: ``Failed``, or else ``Finished``, ``Embedded``, ``Ranked`` or the last ``Tokenized``, as its command has it.
What is cancelled ends with ``Finished``, whatever its command. No line is longer than ``LINE_BYTES``: an answer whose
size follows its request is sent in parts, and what would be too much in all is refused.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

MAX_LOGPROBS = 20
"""Alternatives that can be asked for in a token's place."""
MAX_PROMPT_LOGPROBS = 1 << 19
"""Log-probabilities of one prompt that can be told: of each token, and of the alternatives in its place."""
MAX_TOKENIZED = 1 << 20
"""Tokens that one ``Tokenize`` can be answered with."""
LINE_BYTES = 64 << 20
"""Of one message, its line's end included."""
PART_TOKENS = 4096
"""In one part of ``Tokenized``, which then takes a few milliseconds to read."""
PART_BYTES = 1 << 17
"""Of the texts of these tokens, or of one longer text."""
PART_LOGPROBS = 512
"""The same of ``PromptLogprobs``."""


class Message(BaseModel):
    """Frozen, and refuses unknown fields: a message that is not understood whole is not acted on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- what a request asks for ---


class SamplingParams(Message):
    """How the next token is chosen from the logits. Every runner applies the fields in this order.

    0. Of a request with a grammar, tokens that it does not allow next are left out before all else.
    1. ``repetition_penalty`` r over the distinct tokens of prompt and output so far: positive logits are divided by r,
       negative ones multiplied (Keskar et al., "CTRL", 2019). ``presence_penalty`` and ``frequency_penalty`` subtract
       from the logits of tokens already in the output, once or per occurrence (OpenAI's formula).
    2. ``logit_bias`` is added.
    3. ``temperature`` divides; 0 is greedy: the largest logit wins, the lowest id among equals.
    4. ``top_k`` largest are kept (0: all), equals of the last one included; of these, probabilities below ``min_p``
       times the largest are dropped, then the smallest set of the most probable whose sum reaches ``top_p`` is kept.
    5. Of the kept tokens one is drawn in proportion to its probability: of the blocks of 512 consecutive token ids,
       the block b with the largest ln(sum of its probabilities) + noise(512 + b), then of its tokens the one at place i
       with the largest ln(probability) + noise(i), where noise(j) is ``randomness.gumbels(seed, position, j)``. Among
       equals the lowest wins.
    """

    temperature: float = Field(default=1.0, ge=0, le=100)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    presence_penalty: float = Field(default=0.0, ge=-100, le=100)
    frequency_penalty: float = Field(default=0.0, ge=-100, le=100)
    logit_bias: Mapping[int, float] = {}
    seed: int = Field(ge=0, lt=1 << 64)


class Text(Message):
    """A stretch of the prompt. Where ``special`` is false, "<|im_end|>" is ten ordinary characters."""

    text: str
    special: bool = False


Prompt = Annotated[tuple[Text, ...], Field(fail_fast=True)] | Annotated[tuple[int, ...], Field(fail_fast=True)]
"""Text that the runner tokenizes, or token ids. Without ``fail_fast``, each token id would be a finding about text."""


class Grammar(Message):
    """What the whole output must match; ``source`` as llguidance reads it.

    Output that matches and cannot go on ends with reason "stop", an end-of-generation token after it or not.
    """

    syntax: Literal["json_schema", "regex", "lark"]
    source: str


# --- server to runner ---


class Load(Message):
    """The first command. ``table`` is the card's table for this runner, unread by the server.

    ``backend`` is the card backend that the router chose; a runner that cannot serve by it fails. ``directories`` are
    searched in order for the model's files, each also under ``model_id`` with "/" as "--".
    """

    type: Literal["load"] = "load"
    model_id: str
    backend: str
    table: Mapping[str, JsonValue] = {}
    directories: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    """What the card says that the model is for, such as "TextEmbedding"; for an engine that must know before it loads.
    Empty: to generate text."""


class Estimate(Message):
    """Asks, before ``Load``, how much memory that would take. No weights are read. A server may do without."""

    type: Literal["estimate"] = "estimate"
    load: Load


class Sibling(Message):
    """A sequence that differs from another in its id and its seed only."""

    id: str
    seed: int = Field(ge=0, lt=1 << 64)


class Generate(Message):
    """One sequence to generate. ``prompt`` is token ids, or text that the runner tokenizes, with BOS where due.

    ``delivered`` are output tokens that another runner generated before it died. This one goes on at the next position
    as if it had generated them: they are in the context, penalties, ``max_tokens`` and ``completion_tokens`` count
    them, and text held back stays held back. What was delivered and what follows make the undisturbed output.
    """

    type: Literal["generate"] = "generate"
    id: str
    prompt: Prompt
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    max_tokens: int | None = Field(default=None, ge=0)
    """None: until the context is full. 0: the prompt is computed, and no more."""
    ignore_eos: bool = False
    grammar: Grammar | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Tell how probable each token was, and this many of the most probable ones in its place. None: do not."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """The same for the tokens of the prompt, by ``PromptLogprobs`` before the first ``Deltas``."""
    show_special: bool = False
    """The texts of control tokens are part of the output's text. Those that end generation never are."""
    delivered: tuple[int, ...] = ()
    exact: bool = False
    """The result has to be repeatable to the last bit, so nothing may change its rounding meanwhile, such as the number
    of threads."""
    also: tuple[Sibling, ...] = ()
    """Further sequences with the same prompt, which is sent once. Nothing was ``delivered`` of any of them."""


class Embed(Message):
    """One text or list of token ids to be made a vector."""

    type: Literal["embed"] = "embed"
    id: str
    prompt: Prompt
    truncate: bool = False
    """Whether a text that is too long is cut at its end; otherwise it is refused."""


class Rank(Message):
    """One document to be judged by how well it answers a query."""

    type: Literal["rank"] = "rank"
    id: str
    query: str
    document: str


class Tokenize(Message):
    """Text to be cut into tokens, or token ids to be told the bytes of."""

    type: Literal["tokenize"] = "tokenize"
    id: str
    prompt: Prompt
    add_bos: bool = True
    """Whether text gets a BOS token where due, as a prompt does."""


class Cancel(Message):
    """Ends a request between two steps. Idempotent; unknown and finished ids are ignored."""

    type: Literal["cancel"] = "cancel"
    id: str


class Cores(Message):
    """Tells how many CPU cores the runner may compute on from now on, since other runners compute as well.

    May come at any time after ``Ready``. A runner that cannot change its number of threads ignores it.
    """

    type: Literal["cores"] = "cores"
    count: int = Field(ge=1)


class Shutdown(Message):
    """Ends the runner; what is in flight is failed with code "shutdown"."""

    type: Literal["shutdown"] = "shutdown"


Request = Generate | Embed | Rank | Tokenize
"""What has an id and ends with one message."""
Command = Annotated[Estimate | Load | Request | Cancel | Cores | Shutdown, Field(discriminator="type")]

# --- runner to server ---


class Capabilities(Message):
    """What this runner, with this model, can do. Counts of tokens and sequences; sizes in bytes."""

    engine: str
    engine_version: str
    backend: str
    """The card backend in use, such as "LlamaCppCuda"."""
    devices: tuple[str, ...] = ()
    context_length: int
    """Tokens that one sequence may hold, prompt and output together."""
    slots: int
    vocabulary: int
    grammar: bool = False
    logprobs: bool = False
    embeddings: bool = False
    rerank: bool = False
    vision: bool = False
    model_bytes: int = 0
    chat_template: str | None = None
    """Jinja source, from the card or else from the model's file."""
    bos_token: str = ""
    eos_token: str = ""
    special_tokens: tuple[str, ...] = ()
    """Texts that tokenize to control tokens where special text is allowed."""
    special_ids: tuple[int, ...] = ()
    """Their token ids, in the same order."""


class LoadOption(Message):
    """One way to load a model, and the bytes that it takes once the model has worked with its context full.

    Where the processors' memory and a device's are the same, as on a Mac, a byte counts in both. NVIDIA devices are
    called by CUDA's numbers as this machine's processes see them: "CUDA0", "CUDA1".
    """

    settings: Mapping[str, JsonValue] = {}
    """Keys of the card's table, and the values that this way needs there."""
    host: int = Field(ge=0)
    """Of the processors' memory."""
    device: int = Field(default=0, ge=0)
    """Of the machine's first device, which an engine that has only one takes."""
    devices: Mapping[str, Annotated[int, Field(ge=0)]] = {}
    """Of devices that the runner calls by name, besides that."""
    later_host: int = Field(default=0, ge=0)
    """Of ``host``, what is not taken by loading but with the first request that needs it; so the next two."""
    later_device: int = Field(default=0, ge=0)
    later_devices: Mapping[str, Annotated[int, Field(ge=0)]] = {}
    parts: Mapping[str, int] = {}
    """What the bytes are for, such as "weights" and "KV cache"."""


class Estimated(Message):
    """The answer to ``Estimate``; a runner that cannot load the model says ``Failed`` instead."""

    type: Literal["estimated"] = "estimated"
    choices: tuple[LoadOption, ...] = Field(min_length=1)
    """The best first: one, unless the card leaves something open with "auto"."""
    enough: int = Field(default=0, ge=0)
    """The place of the choice for whose sake others are unloaded; the better ones are for memory that is free."""
    remedies: tuple[LoadOption, ...] = ()
    """What would take less if the card said so: of each setting, the smallest change first."""


RunnerState = Literal[
    "Idle", "Loading", "Loaded", "WarmingUp", "Ready", "Running", "ShuttingDown", "Shutdown", "Failed"
]


class Status(Message):
    """The runner's own state, in upstream's names. ``capabilities`` come with the first "Ready", and only then.

    "Running" while a request is in flight, "Ready" again when none is.
    """

    type: Literal["status"] = "status"
    state: RunnerState
    layers_loaded: int = 0
    total_layers: int = 0
    capabilities: Capabilities | None = None


class PrefillProgress(Message):
    """Tokens of the prompt, and of what was delivered before, computed so far.

    The first one, sent on acceptance, has ``processed`` 0.
    """

    type: Literal["prefill_progress"] = "prefill_progress"
    id: str
    processed: int
    total: int


class Logprob(Message):
    """One token at one place. ``bytes`` are what it adds to the text, or the text of a control token."""

    token: int
    bytes: tuple[int, ...]
    logprob: float | None
    """Natural logarithm of its probability by the model alone: before grammar, penalties, bias and temperature. At
    least -9999. None for the first token of a prompt, which follows nothing."""


class TokenLogprobs(Message):
    """A token and the most probable ones in its place, the most probable first, the lowest id first among equals."""

    chosen: Logprob
    top: tuple[Logprob, ...] = ()


class PromptLogprobs(Message):
    """Tokens of the prompt from place ``start`` on. The parts come in order, each place once."""

    type: Literal["prompt_logprobs"] = "prompt_logprobs"
    id: str
    start: int = Field(default=0, ge=0)
    items: tuple[TokenLogprobs, ...]


class Delta(Message):
    """New tokens of one sequence and the text they release, which may lag behind (held back) or be empty."""

    id: str
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token where the request asks for them."""


class Deltas(Message):
    """All sequences that advanced in one step."""

    type: Literal["deltas"] = "deltas"
    items: tuple[Delta, ...]


FinishReason = Literal["stop", "length", "cancelled"]


class Usage(Message):
    """Tokens. ``cached_tokens`` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Finished(Message):
    """Terminal. ``text`` is what was still held back; ``stop`` the stop string that matched, which is never shown.

    ``completion_tokens`` counts every generated token up to the last one delivered, an end-of-generation token
    included.
    """

    type: Literal["finished"] = "finished"
    id: str
    reason: FinishReason
    usage: Usage
    text: str = ""
    stop: str | None = None


class Embedded(Message):
    """Terminal. The vector of a text, of Euclidean length 1; its size is the same for all texts."""

    type: Literal["embedded"] = "embedded"
    id: str
    vector: tuple[float, ...]
    usage: Usage


class Ranked(Message):
    """Terminal. ``score`` is the model's own; only its order means something."""

    type: Literal["ranked"] = "ranked"
    id: str
    score: float
    usage: Usage


class Tokenized(Message):
    """Tokens and what each adds to the text, or the text of a control token. Terminal unless there is ``more``."""

    type: Literal["tokenized"] = "tokenized"
    id: str
    more: bool = False
    """Whether another part follows."""
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
    """Terminal for request ``id``; without an id, for the runner itself. ``param`` names the request's field.

    A message may quote the request: it is cut where it gets long.
    """

    type: Literal["failed"] = "failed"
    id: str | None = None
    code: ErrorCode
    message: Annotated[str, AfterValidator(_cut)]
    param: str | None = None


class CpuUse(Message):
    """How a runner computes on the CPU, and what other programs cost it."""

    threads: int = Field(ge=1)
    """Threads that compute a step of one row."""
    reason: str
    """Why there are so many, in words that follow the number."""
    delay: float = Field(ge=0, le=1)
    """Share of the time in which the computing threads wanted to run and waited for a core."""
    slowdown: float = Field(ge=0)
    """Times as long as when the machine is quiet that a step takes."""


class Heartbeat(Message):
    """Sent about once a second. ``steps`` counts the loop's steps; a busy runner whose count stands still is stuck.

    While it estimates or loads, ``cpu_seconds`` and ``bytes_read`` tell how much the process and its children have
    computed and read since the process started. A load where these stand still and no progress is reported is stuck.
    """

    type: Literal["heartbeat"] = "heartbeat"
    steps: int
    active: int
    waiting: int
    cpu_seconds: float = 0.0
    """Without the thread that sends heartbeats."""
    bytes_read: int = 0
    cpu: CpuUse | None = None
    """None from a runner that does not compute on the CPU, or cannot tell."""


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

# --- what a runner can do on this host, told without loading a model: ``python -m module --probe`` ---


class Device(Message):
    """One device an engine can use. Memory in bytes; 0 where the engine does not tell."""

    name: str
    description: str = ""
    backend: str
    memory_total: int = 0
    memory_free: int = 0
    address: str = ""
    """On the PCI bus, such as "0000:c1:00.0"; empty where it has none or the engine does not tell."""


class Probe(Message):
    """Whether the engine is installed and which card backends it can really serve here."""

    installed: bool
    engine: str
    version: str = ""
    backends: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()
    notes: tuple[str, ...] = ()
    """What is missing or limited, in plain sentences."""
    remedy: str = ""
    """The one command that mends it, or empty."""


# --- how probable a runner finds given texts, for comparing engines: ``python -m module --score``, a ``Score`` on
# standard input, a ``Scored`` or a ``Failed`` on standard output ---


class Score(Message):
    """Texts to be read through token by token, each by itself, as they stand (teacher forcing)."""

    load: Load
    prompts: tuple[tuple[Text, ...] | tuple[int, ...], ...]
    directory: str
    """Prompt i's log-probabilities go to ``i.npy`` in here: float32, shape (tokens, vocabulary), row j for the token
    that follows the first j + 1."""


class Scored(Message):
    """The token ids that were read, and by what. ``settings`` are what rounding depends on, such as cache types."""

    tokens: tuple[tuple[int, ...], ...]
    capabilities: Capabilities
    settings: Mapping[str, str] = {}


COMMANDS: TypeAdapter[Command] = TypeAdapter(Command)
EVENTS: TypeAdapter[Event] = TypeAdapter(Event)
