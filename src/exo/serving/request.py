"""A request to generate text, in no API's form, and its JSON Schemas in the form that grammars can enforce."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import JsonValue
from pydantic_core import from_json, to_json

from exo.cards.card import ModelCard
from exo.chat.grammar.tool_schema import NamedChoice, Tool, ToolChoice
from exo.serving.errors import RequestError
from exo.serving.pictures.prompt_pictures import GivenPicture
from exo.serving.warnings import warn
from exo.worker.protocol.commands import UsedAdapter
from exo.worker.protocol.events import Failed
from exo.worker.protocol.runners import Need
from exo.worker.runner_common.grammar.grammar_errors import named
from exo.worker.runner_common.grammar.json_schema import LONGEST_SOURCE, enforced, guided
from exo.worker.runner_common.grammar.schema_keywords import SchemaError

GrammarSyntax = Literal["json_schema", "regex", "lark", "gbnf"]


@dataclass(frozen=True, slots=True)
class OutputConstraint:
    """The output must match this. ``param`` is the field of the request that demands it."""

    syntax: GrammarSyntax
    source: str
    param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages from which a chat template makes the prompt. Each has at least a ``role``.

    The fields that end in ``_param`` are the client's names of fields, for error messages.
    """

    messages: tuple[Mapping[str, JsonValue], ...]
    tools: tuple[Tool, ...] = ()
    """The tools that the model may call. Those that ``tool_choice`` excludes are not among them."""
    forced: tuple[Tool, ...] = ()
    """The reply must call one of these tools, whose schemas can be enforced; empty if it need not call any."""
    choice: ToolChoice = "auto"
    choice_param: str = "tool_choice"
    parallel: bool = True
    """Whether one reply may have several calls."""
    variables: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    """Further variables of the chat template, such as ``enable_thinking``."""
    effort: str | None = None
    """How much the model should reason: "none", "minimal", "low", "medium", "high" or "xhigh"; "on": as it decides."""
    effort_param: str = "reasoning_effort"
    reasoning_tokens: int | None = None
    """The most tokens of reasoning, whatever the effort."""
    reasoning_tokens_param: str = "max_reasoning_tokens"
    continues: bool = False
    """Whether the reply continues the last message, which is the assistant's."""
    pictures: Mapping[str, GivenPicture] = field(default_factory=dict[str, GivenPicture])
    """The pictures in the messages, by the marks in their places."""

    @property
    def must_call(self) -> bool:
        """Whether the reply must be a tool call."""
        return self.choice == "required" or isinstance(self.choice, NamedChoice)


@dataclass(frozen=True, slots=True, kw_only=True)
class Infill:
    """A text whose middle is to be filled in, by a model that has control tokens for that."""

    prefix: str
    suffix: str
    beginning: str = ""
    """The middle begins with this."""
    files: tuple[tuple[str, str], ...] = ()
    """Other files of the same repository: names and texts."""
    suffix_param: str = "suffix"


@dataclass(frozen=True, slots=True)
class WantedAdapter:
    """An adapter that a request names by its number in the model's list or, without one, by its name."""

    number: int | None
    name: str
    scale: float


@dataclass(frozen=True, slots=True)
class RequestedModel:
    """The model card of a request, and the runner and the adapter if the request's ``model`` names them."""

    card: ModelCard
    runner: str | None
    adapter: str = ""
    adapters: tuple[UsedAdapter, ...] = ()
    """The adapters to use: that one, or those of another field of the request."""

    @property
    def name(self) -> str:
        """The model's name in replies."""
        return f"{self.card.model_id}:{self.adapter}" if self.adapter else self.card.model_id

    def with_adapters(self, wanted: Sequence[WantedAdapter]) -> "RequestedModel":
        """The model with the adapters that a request's field ``lora`` names. Raises RequestError."""
        if not wanted:
            return self
        if self.adapter:
            raise _wrong("lora", f"the model has the adapter {self.adapter!r} already; name {self.card.model_id} alone")
        numbers = dict(enumerate(self.card.adapters))
        used: dict[str, UsedAdapter] = {}
        for at, each in enumerate(wanted):
            name = each.name if each.number is None else numbers.get(each.number, "")
            if name not in self.card.adapters:
                known = ", ".join(f"{name} (id {number})" for number, name in numbers.items()) or "none"
                raise _wrong(f"lora.{at}", f"{self.card.model_id} has no such adapter; it has {known}")
            if name in used:
                raise _wrong(f"lora.{at}", f"the adapter {name!r} is there twice")
            used[name] = UsedAdapter(name=name, scale=each.scale)
        return replace(self, adapters=tuple(each for each in used.values() if each.scale))


Prompt = Conversation | Infill | str | tuple[int | str, ...]
"""In a text, control tokens are special. Token ids may be mixed with texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request to generate text. Choices are numbered prompt by prompt, ``n`` for each."""

    prompts: tuple[Prompt, ...]
    prompt_field: str
    """The client's name of the prompt's field, as are the fields that end in ``_param``."""
    n: int = 1
    sampling: Mapping[str, float] = field(default_factory=dict[str, float])
    """Fields of ``SamplingParams`` that the client set; the card's defaults apply to the others."""
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    allowed: tuple[int, ...] = ()
    """No other tokens are chosen; empty for all."""
    seed: int | None = None
    """Choice i of a prompt is generated with ``seed + i``. None means a random seed."""
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    show_stop: bool = False
    """Whether the stop string or stop token that ends the output is part of it."""
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    cache_prompt: bool = True
    constraint: OutputConstraint | None = None
    logprobs: int | None = None
    """The number of alternatives whose log-probabilities are wanted besides the token's own; None for no values."""
    logprobs_param: str = "logprobs"
    context: int = 0
    """The context length that the client expects, in tokens."""
    context_param: str = "num_ctx"
    keep_seconds: float | None = None
    """How long the model stays loaded afterwards without being used; None changes nothing."""
    adapters: tuple[WantedAdapter, ...] = ()
    """The adapters that the field ``lora`` names."""
    echo: bool = False
    """Whether the reply begins with the prompt, which is text or token ids. With ``logprobs``, it has those of both."""

    @property
    def choices(self) -> int:
        """The number of sequences to generate."""
        return len(self.prompts) * self.n

    @property
    def needs(self) -> Mapping[Need, str]:
        """The features that a runner needs for this request, each with the field that requires it."""
        needs: dict[Need, str] = {}
        for prompt in self.prompts:
            if not isinstance(prompt, Conversation):
                continue
            if prompt.must_call:
                needs["grammar"] = prompt.choice_param
            if (seen := next((each for each in prompt.pictures.values() if each.answered), None)) is not None:
                needs["vision"] = seen.param
        if self.constraint is not None:
            needs["grammar"] = self.constraint.param
        if self.logprobs is not None:
            needs["logprobs"] = self.logprobs_param
        if any(each.scale for each in self.adapters):
            needs["adapter_scales"] = "lora"
        return needs


def with_enforced_schemas(request: GenerationRequest) -> GenerationRequest:
    """The request with schemas that can be enforced. Warns of each keyword that cannot. Raises ``ServingError``."""
    constraint = request.constraint
    if constraint is not None and constraint.syntax == "json_schema" and len(constraint.source) <= LONGEST_SOURCE:
        constraint = _enforced_constraint(constraint)
    return replace(request, constraint=constraint, prompts=tuple(map(_enforced_prompt, request.prompts)))


def naming_tools(failed: Failed, request: GenerationRequest) -> Failed:
    """Adds the names of the tools to a failure of their grammar that names none."""
    tools = [tool.name for prompt in request.prompts if isinstance(prompt, Conversation) for tool in prompt.forced]
    if failed.param != "grammar" or not tools or ": tool " in failed.message:
        return failed
    names = ", ".join(map(repr, tools[:5])) + (f" and {len(tools) - 5} more" if len(tools) > 5 else "")
    reason = failed.message.removeprefix("grammar: ")
    which = "tool" if len(tools) == 1 else "tools"
    return failed.model_copy(update={"message": f"grammar: {which} {names}: {reason}"})


def _enforced_constraint(constraint: OutputConstraint) -> OutputConstraint:
    param = constraint.param
    try:
        found = enforced(from_json(constraint.source))
    except ValueError:
        return constraint  # the runner's error explains it
    except SchemaError as error:
        where = ".".join(filter(None, (param, error.where)))
        raise RequestError(f"{where}: {error.reason}", code="unsupported_value", param=param) from None
    for note in found.notes:
        warn(f"{param}.{note.where}", note.text)
    return replace(constraint, source=to_json(guided(found.schema)).decode())


def _enforced_prompt(prompt: Prompt) -> Prompt:
    if not isinstance(prompt, Conversation) or not prompt.must_call:
        return prompt
    tools = prompt.tools
    if isinstance(prompt.choice, NamedChoice):
        tools = tuple(tool for tool in tools if tool.name == prompt.choice.name)
    return replace(prompt, forced=tuple(_enforced_tool(tool, prompt.choice_param) for tool in tools))


def _enforced_tool(tool: Tool, param: str) -> Tool:
    """The tool with a schema that can be enforced and that names the tool in its errors."""
    owner = f"tool {tool.name!r}"
    try:
        found = enforced({key: each for key, each in tool.parameters.items() if key != "nullable"})
    except SchemaError as error:
        raise RequestError(f"{param}: {owner}: {error}", code="unsupported_value", param=param) from None
    for note in found.notes:
        warn(f"{owner}: {note.where}", note.text)
    parameters = found.schema if isinstance(found.schema, dict) else dict[str, JsonValue](tool.parameters)
    properties = parameters.get("properties")
    if isinstance(properties, Mapping):
        owned: dict[str, JsonValue] = {
            name: named(each, f"{owner}, property {name!r}") if isinstance(each, dict) else each
            for name, each in properties.items()
        }
        parameters = {**parameters, "properties": owned}
    return replace(tool, parameters=named(parameters, owner))


def _wrong(param: str, why: str) -> RequestError:
    return RequestError(f"{param}: {why}", code="invalid_value", param=param)
