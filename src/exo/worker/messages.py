"""The contract: every message between the server and a runner.

A runner is a program that reads one JSON object a line on standard input (``Command``) and writes one a line on
standard output (``Event``). What must hold is in ``tests/test_contract.py``, which runs against every runner:
``Ready`` or ``Failed`` comes before anything else is accepted, and exactly one of ``Finished`` and ``Failed`` ends each
request.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter


class Message(BaseModel):
    """Frozen, and refuses unknown fields: a message that is not understood whole is not acted on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- what a request asks for ---


class SamplingParams(Message):
    """How the next token is chosen from the logits. Every runner applies the fields in this order.

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


class Generate(Message):
    """One sequence to generate. ``prompt`` is token ids, or text that the runner tokenizes, with BOS where due.

    ``delivered`` are output tokens that another runner generated before it died. This one goes on at the next position
    as if it had generated them: they are in the context, penalties, ``max_tokens`` and ``completion_tokens`` count
    them, and text held back stays held back. What was delivered and what follows make the undisturbed output.
    """

    type: Literal["generate"] = "generate"
    id: str
    prompt: tuple[Text, ...] | tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    max_tokens: int | None = Field(default=None, ge=1)
    """None: until the context is full."""
    ignore_eos: bool = False
    delivered: tuple[int, ...] = ()


class Cancel(Message):
    """Ends a request between two steps. Idempotent; unknown and finished ids are ignored."""

    type: Literal["cancel"] = "cancel"
    id: str


class Shutdown(Message):
    """Ends the runner; what is in flight is failed with code "shutdown"."""

    type: Literal["shutdown"] = "shutdown"


Command = Annotated[Load | Generate | Cancel | Shutdown, Field(discriminator="type")]

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
    vision: bool = False
    model_bytes: int = 0
    chat_template: str | None = None
    """Jinja source, from the card or else from the model's file."""
    bos_token: str = ""
    eos_token: str = ""
    special_tokens: tuple[str, ...] = ()
    """Texts that tokenize to control tokens where special text is allowed."""


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


class Delta(Message):
    """New tokens of one sequence and the text they release, which may lag behind (held back) or be empty."""

    id: str
    tokens: tuple[int, ...]
    text: str


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


ErrorCode = Literal[
    "invalid_request",
    "context_length_exceeded",
    "model_not_found",
    "model_load_failed",
    "out_of_memory",
    "engine_error",
    "runner_died",
    "shutdown",
]


class Failed(Message):
    """Terminal for request ``id``; without an id, for the runner itself. ``param`` names the request's field."""

    type: Literal["failed"] = "failed"
    id: str | None = None
    code: ErrorCode
    message: str
    param: str | None = None


class Heartbeat(Message):
    """Sent about once a second. ``steps`` counts the loop's steps; a busy runner whose count stands still is stuck."""

    type: Literal["heartbeat"] = "heartbeat"
    steps: int
    active: int
    waiting: int


Event = Annotated[
    Status | PrefillProgress | Deltas | Finished | Failed | Heartbeat,
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
