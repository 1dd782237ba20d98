"""What a client asks for, in no dialect."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue

from exo.chat.grammar.tool_schema import NamedChoice, Tool, ToolChoice
from exo.worker.protocol.runners import Need

GrammarSyntax = Literal["json_schema", "regex", "lark", "gbnf"]


@dataclass(frozen=True, slots=True)
class OutputConstraint:
    """What the output must match. ``param`` is the request's field that says so."""

    syntax: GrammarSyntax
    source: str
    param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages from which a chat template makes the prompt; each has at least a ``role``."""

    messages: tuple[Mapping[str, JsonValue], ...]
    tools: tuple[Tool, ...] = ()
    """Those that may be called; what ``tool_choice`` excludes is not among them."""
    forced: tuple[Tool, ...] = ()
    """The tools of which the reply must call one, with schemas that can be enforced; empty where it need not."""
    choice: ToolChoice = "auto"
    choice_param: str = "tool_choice"
    """What the client calls ``choice``."""
    parallel: bool = True
    """Whether there may be several calls in one reply."""
    variables: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    """What else the template is to know, such as ``enable_thinking``."""
    effort: str | None = None
    """How much the model is to reason: "none", "minimal", "low", "medium", "high" or "xhigh"."""
    effort_param: str = "reasoning_effort"
    """What the client calls ``effort``."""
    continues: bool = False
    """Whether the reply goes on with the last message, which is the assistant's."""

    @property
    def must_call(self) -> bool:
        """Whether the reply has to be a call."""
        return self.choice == "required" or isinstance(self.choice, NamedChoice)


Prompt = Conversation | str | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request to generate text. Choices are numbered prompt by prompt, ``n`` for each."""

    model: str
    """A model id or alias, perhaps with "@runner"."""
    prompts: tuple[Prompt, ...]
    prompt_field: str
    """What the client calls the prompt, for error messages."""
    n: int = 1
    sampling: Mapping[str, float] = field(default_factory=dict[str, float])
    """Fields of ``SamplingParams`` that the client set; the card's defaults apply to the others."""
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None
    """Choice i of a prompt is generated with ``seed + i``. None: a random one."""
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    ignore_eos: bool = False
    constraint: OutputConstraint | None = None
    logprobs: int | None = None
    """How many alternatives to tell the probabilities of, besides the chosen token's; None: tell nothing."""
    logprobs_param: str = "logprobs"
    context: int = 0
    """Tokens that the context must hold at least."""
    context_param: str = "num_ctx"
    keep_seconds: float | None = None
    """How long the model then stays loaded without being used; None changes nothing."""
    echo: bool = False
    """Whether the reply begins with the prompt, which is text or token ids; with ``logprobs``, with those too."""

    @property
    def choices(self) -> int:
        """Sequences to generate."""
        return len(self.prompts) * self.n

    @property
    def needs(self) -> Mapping[Need, str]:
        """What a runner must be able to do for this, with the field that asks for it."""
        needs: dict[Need, str] = {}
        for prompt in self.prompts:
            if isinstance(prompt, Conversation) and prompt.must_call:
                needs["grammar"] = prompt.choice_param
        if self.constraint is not None:
            needs["grammar"] = self.constraint.param
        if self.logprobs is not None:
            needs["logprobs"] = self.logprobs_param
        return needs
