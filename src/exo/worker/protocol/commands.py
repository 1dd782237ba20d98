"""The server's messages to a runner."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, JsonValue, TypeAdapter

from exo.worker.protocol.messages import MAX_LOGPROBS, Message


class SamplingParams(Message):
    """How the next token is chosen from the logits. Every runner applies the fields in this order.

    0. Tokens that the request's grammar does not allow next are left out first.
    1. ``repetition_penalty`` r over the distinct tokens of prompt and output so far: positive logits are divided by r,
       negative ones multiplied (Keskar et al., "CTRL", 2019). ``presence_penalty`` and ``frequency_penalty`` subtract
       from the logits of tokens already in the output, once or per occurrence (OpenAI's formula). With a
       ``repetition_window``, ``repetition_penalty`` counts only so many of the last tokens.
    2. ``logit_bias`` is added. With ``allowed`` tokens, all others are excluded, unless the grammar or the limit of
       reasoning leaves only such.
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
    repetition_window: int = Field(default=0, ge=0, le=1 << 30)
    """0: all tokens."""
    presence_penalty: float = Field(default=0.0, ge=-100, le=100)
    frequency_penalty: float = Field(default=0.0, ge=-100, le=100)
    logit_bias: Mapping[int, float] = {}
    allowed: tuple[int, ...] = ()
    """Empty: all."""
    seed: int = Field(ge=0, lt=1 << 64)


class Text(Message):
    """A stretch of the prompt. Unless it is ``special``, "<|im_end|>" is ten ordinary characters."""

    text: str
    special: bool = False


class Picture(Message):
    """A picture in its place of the prompt: a PNG with 8-bit RGB pixels, not interlaced, in standard base64.

    The runner puts the model's own tokens around it. ``messages.py`` has the limits. A prompt ends with text.
    """

    png: str


Prompt = (
    Annotated[tuple[Text | Picture, ...], Field(fail_fast=True)] | Annotated[tuple[int, ...], Field(fail_fast=True)]
)
"""Text that the runner tokenizes, with pictures, or token ids. Only ``Generate`` takes pictures.

``fail_fast``: or each token id would be an error about text.
"""


class Grammar(Message):
    """The whole output must match it. ``source`` is in llguidance's syntax.

    Output that matches and cannot continue ends with reason "stop", with or without an end-of-generation token.
    """

    syntax: Literal["json_schema", "regex", "lark"]
    source: str


class ReasoningLimit(Message):
    """Reasoning of at most ``max_tokens`` tokens: the runner then writes ``closing``, and the model goes on after it.

    Reasoning is the text between ``begin`` and ``end``. ``closing`` contains ``end``. Texts of control tokens in all
    three stand for the tokens.
    """

    max_tokens: int = Field(ge=0)
    begin: str = Field(min_length=1)
    end: str = Field(min_length=1)
    closing: str = Field(min_length=1)
    inside: bool = False
    """The output begins inside reasoning."""
    anywhere: bool = False
    """Reasoning may begin anywhere in the output, and not only before everything else."""


class Peer(Message):
    """Another host, which may hold a part of the model."""

    name: str
    """The name of the host, which precedes those of its devices, as in "gpu2/CUDA0"."""
    command: tuple[str, ...]
    """Starts this runner's program there, with its pipes here."""
    address: str
    """The host's address in the network between the hosts, where engines talk to each other."""
    directories: tuple[str, ...] = ()
    """The models directories there, for engines that read a part of the model on each host."""


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
    prefixes: str = ""
    """The directory for computed prefixes of prompts that are to outlast the runner. Empty: they need not."""
    tasks: tuple[str, ...] = ()
    """The card's tasks, such as "TextEmbedding", for an engine that must know them to load. Empty: generation."""
    smaller: Mapping[str, JsonValue] = {}
    """Values for ``table`` that take less memory. If memory runs out, the runner tries once more with them and says so
    in ``Capabilities.retried``. Empty: it does not."""
    peers: tuple[Peer, ...] = ()
    """Hosts among which the model is divided, besides this one. A runner that cannot do that fails."""


class Estimate(Message):
    """Asks how much memory a ``Load`` would take, without reading weights. Optional."""

    type: Literal["estimate"] = "estimate"
    load: Load


class Sibling(Message):
    """A sequence that differs from another one in its id and its seed only."""

    id: str
    seed: int = Field(ge=0, lt=1 << 64)


class UsedAdapter(Message):
    """One of the model's adapters, which changes its weights for a request."""

    name: str
    scale: float | None = Field(default=None, ge=-100, le=100, allow_inf_nan=False)
    """The factor of the change; None: the one of the model card or of the adapter's files."""


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
    stop_tokens: tuple[int, ...] = ()
    """Further tokens that end the output, as stop strings do."""
    show_stop: bool = False
    """The stop string or stop token that ends the output is part of its text."""
    max_tokens: int | None = Field(default=None, ge=0)
    """None: until the context is full. 0: only the prompt is computed."""
    ignore_eos: bool = False
    """End-of-generation tokens are never chosen."""
    min_tokens: int = Field(default=0, ge=0)
    """End-of-generation tokens are not chosen for the first tokens of the output, as many as these, and neither stop
    strings nor stop tokens end it there. A grammar whose match is complete ends it earlier."""
    grammar: Grammar | None = None
    reasoning: ReasoningLimit | None = None
    """The grammar, if any, takes precedence over it."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Report each token's log-probability, and this many of the most probable tokens in its place. None: neither."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """The same for the prompt's tokens, in ``PromptLogprobs`` before the first ``Deltas``."""
    cache_prompt: bool = True
    """False: every token of the prompt is computed, even if the prefix cache has it."""
    show_special: bool = False
    """The output's text has the texts of control tokens, except those that end generation."""
    delivered: tuple[int, ...] = ()
    exact: bool = False
    """The result must be repeatable to the last bit: nothing may change its rounding, such as the number of threads."""
    adapters: tuple[UsedAdapter, ...] = ()
    """Each adapter at most once. Only ``Capabilities.adapter_scales`` allows several of them, or a scale."""
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
COMMANDS: TypeAdapter[Command] = TypeAdapter(Command)
