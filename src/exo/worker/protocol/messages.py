"""The contract: every message between the server and a runner.

A runner is a program that reads one JSON object a line on standard input (``Command``) and writes one a line on
standard output (``Event``). ``tests/contract`` tests these invariants on every runner:

- ``Ready`` or ``Failed`` precedes every other event but ``Estimated``.
- Each request ends with exactly one terminal event: ``Failed``, or else ``Finished``, ``Embedded``, ``Ranked`` or the
  last ``Tokenized``, according to its command. A cancelled request of any kind ends with ``Finished``.
- No line is longer than ``LINE_BYTES``. A large reply is sent in parts; a request for a larger one still is refused.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

MAX_LOGPROBS = 20
"""The most alternatives that a request can have in a token's place."""
MAX_PROMPT_LOGPROBS = 1 << 19
"""The most log-probabilities of one prompt: its tokens and their alternatives."""
MAX_TOKENIZED = 1 << 20
"""The most tokens in the reply to one ``Tokenize``."""
LINE_BYTES = 64 << 20
"""The longest line, its end included."""
PART_TOKENS = 4096
"""The most tokens in one part of ``Tokenized``, which the server then reads in a few milliseconds."""
PART_BYTES = 1 << 17
"""The most bytes of text in such a part, unless it is a single token's."""
PART_LOGPROBS = 512
"""The most log-probabilities in one part of ``PromptLogprobs``."""


class Message(BaseModel):
    """Frozen. Refuses unknown fields: nobody acts on a message that is understood in part."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- sampling ---


class SamplingParams(Message):
    """How the next token is chosen from the logits. Every runner applies the fields in this order.

    0. Tokens that the request's grammar does not allow next are left out first.
    1. ``repetition_penalty`` r over the distinct tokens of prompt and output so far: positive logits are divided by r,
       negative ones multiplied (Keskar et al., "CTRL", 2019). ``presence_penalty`` and ``frequency_penalty`` subtract
       from the logits of tokens already in the output, once or per occurrence (OpenAI's formula).
    2. ``logit_bias`` is added.
    3. ``temperature`` divides; 0 is greedy: the largest logit wins, the lowest id among equals.
    4. The ``top_k`` largest are kept (0: all), with all equals of the last one. Probabilities below ``min_p`` times the
       largest are dropped. Then the smallest set of the most probable tokens whose sum reaches ``top_p`` is kept.
    5. One of the kept tokens is drawn in proportion to its probability. First a block of 512 consecutive token ids: the
       block b with the largest ln(sum of its probabilities) + noise(512 + b). Then a token in it: the one at place i
       with the largest ln(probability) + noise(i). noise(j) is ``keyed_rng.gumbels(seed, position, j)``. The lowest of
       equals wins.
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
    """A stretch of the prompt. Unless it is ``special``, "<|im_end|>" is ten ordinary characters."""

    text: str
    special: bool = False


Prompt = Annotated[tuple[Text, ...], Field(fail_fast=True)] | Annotated[tuple[int, ...], Field(fail_fast=True)]
"""Text that the runner tokenizes, or token ids. ``fail_fast``: or each token id would be an error about text."""


class Grammar(Message):
    """The whole output must match it. ``source`` is in llguidance's syntax.

    Output that matches and cannot continue ends with reason "stop", with or without an end-of-generation token.
    """

    syntax: Literal["json_schema", "regex", "lark"]
    source: str


# --- server to runner ---


class Load(Message):
    """The first command, unless ``Estimate`` precedes it. ``table`` is the card's table for this runner, unread.

    ``backend`` is the card backend that the router chose; a runner that cannot serve with it fails. The model's files
    are searched in ``directories`` in order, and in each one's subfolder ``model_id`` with "/" as "--".
    """

    type: Literal["load"] = "load"
    model_id: str
    backend: str
    table: Mapping[str, JsonValue] = {}
    directories: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    """The card's tasks, such as "TextEmbedding", for an engine that must know them to load. Empty: generation."""


class Estimate(Message):
    """Asks how much memory a ``Load`` would take, without reading weights. Optional."""

    type: Literal["estimate"] = "estimate"
    load: Load


class Sibling(Message):
    """A sequence that differs from another one in its id and its seed only."""

    id: str
    seed: int = Field(ge=0, lt=1 << 64)


class Generate(Message):
    """One sequence to generate. ``prompt`` is token ids, or text that the runner tokenizes, with BOS where due.

    ``delivered`` are output tokens that another runner generated before it died. This one continues at the next
    position as if it had generated them: they are in the context; penalties, ``max_tokens`` and ``completion_tokens``
    count them; text that was held back stays held back. Together both outputs are the undisturbed one.
    """

    type: Literal["generate"] = "generate"
    id: str
    prompt: Prompt
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    max_tokens: int | None = Field(default=None, ge=0)
    """None: until the context is full. 0: only the prompt is computed."""
    ignore_eos: bool = False
    grammar: Grammar | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Report each token's log-probability, and this many of the most probable tokens in its place. None: neither."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """The same for the prompt's tokens, in ``PromptLogprobs`` before the first ``Deltas``."""
    show_special: bool = False
    """The output's text has the texts of control tokens, except those that end generation."""
    delivered: tuple[int, ...] = ()
    exact: bool = False
    """The result must be repeatable to the last bit: nothing may change its rounding, such as the number of threads."""
    also: tuple[Sibling, ...] = ()
    """More sequences with the same prompt, which is sent once. None of them has ``delivered`` tokens."""


class Embed(Message):
    """Computes the vector of one text or list of token ids."""

    type: Literal["embed"] = "embed"
    id: str
    prompt: Prompt
    truncate: bool = False
    """Cut a text that is too long at its end, instead of refusing it."""


class Rank(Message):
    """Computes how well a document answers a query."""

    type: Literal["rank"] = "rank"
    id: str
    query: str
    document: str


class Tokenize(Message):
    """Tokenizes text, or returns the bytes of token ids."""

    type: Literal["tokenize"] = "tokenize"
    id: str
    prompt: Prompt
    add_bos: bool = True
    """Text gets a BOS token where due, as a prompt does."""


class Cancel(Message):
    """Ends a request between two steps. Idempotent; unknown and finished ids are ignored."""

    type: Literal["cancel"] = "cancel"
    id: str


class Cores(Message):
    """Limits the CPU cores on which the runner computes from now on, because other runners compute as well.

    It may come at any time after ``Ready``. A runner that cannot change its number of threads ignores it.
    """

    type: Literal["cores"] = "cores"
    count: int = Field(ge=1)


class Shutdown(Message):
    """Ends the runner. Requests in flight fail with code "shutdown"."""

    type: Literal["shutdown"] = "shutdown"


Request = Generate | Embed | Rank | Tokenize
"""A command with an id and one terminal event."""
Command = Annotated[Estimate | Load | Request | Cancel | Cores | Shutdown, Field(discriminator="type")]

# --- runner to server ---


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
    vocabulary: int
    grammar: bool = False
    logprobs: bool = False
    embeddings: bool = False
    rerank: bool = False
    vision: bool = False
    model_bytes: int = 0
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

    def template(self, *, tools: bool) -> str | None:
        """The chat template of a request with or without tools."""
        return self.tool_template or self.chat_template if tools else self.chat_template


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


class Estimated(Message):
    """The reply to ``Estimate``. A runner that cannot load the model sends ``Failed`` instead."""

    type: Literal["estimated"] = "estimated"
    choices: tuple[LoadOption, ...] = Field(min_length=1)
    """The best option first. There is only one unless the card has "auto" somewhere."""
    enough: int = Field(default=0, ge=0)
    """The index of the option that justifies unloading other models. Better ones are for free memory only."""
    remedies: tuple[LoadOption, ...] = ()
    """Other settings that take less memory. For each setting, the smallest change comes first."""
    notes: tuple[str, ...] = ()
    """See ``Capabilities.notes``."""


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
    """Counts of tokens. ``cached_tokens`` are those of the prompt that were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


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

# --- a runner's abilities on this host, without loading a model: ``python -m module --probe`` ---


class Device(Message):
    """One device that an engine can use. Memory in bytes; 0 if the engine does not report it."""

    name: str
    description: str = ""
    backend: str
    memory_total: int = 0
    memory_free: int = 0
    address: str = ""
    """On the PCI bus, such as "0000:c1:00.0"; empty if unknown."""


class Probe(Message):
    """Whether the engine is installed, and which card backends it can serve on this host."""

    installed: bool
    engine: str
    version: str = ""
    backends: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences about missing or limited features."""
    remedy: str = ""
    """The command that fixes it, or empty."""


# --- log-probabilities of given texts, to compare engines: ``python -m module --score`` reads a ``Score`` from standard
# input and writes a ``Scored`` or a ``Failed`` to standard output ---


class Score(Message):
    """Texts to evaluate token by token (teacher forcing), each by itself."""

    load: Load
    prompts: tuple[tuple[Text, ...] | tuple[int, ...], ...]
    directory: str
    """Prompt i's log-probabilities go to ``i.npy`` in this folder: float32 of shape (tokens, vocabulary); row j is for
    the token that follows the first j + 1."""


class Scored(Message):
    """The token ids of the texts. ``settings`` are those that rounding depends on, such as cache types."""

    tokens: tuple[tuple[int, ...], ...]
    capabilities: Capabilities
    settings: Mapping[str, str] = {}


COMMANDS: TypeAdapter[Command] = TypeAdapter(Command)
EVENTS: TypeAdapter[Event] = TypeAdapter(Event)
