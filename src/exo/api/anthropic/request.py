"""Anthropic's requests: supported fields, and fields without effect."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import to_json

from exo.api.anthropic.blocks import (
    AnthropicMessage,
    CacheControl,
    PlainContent,
    ToolUseBlock,
    check_results,
    plain_text,
    told,
)
from exo.api.anthropic.history import readable
from exo.api.http.body import RequestBody, Unsupported, honoured, invalid, missing, note
from exo.api.openai.common_request import NoLimit, Stops, TopK, TopP
from exo.api.openai.tools import MAX_TOOLS, Parameters, ToolName, check_tool_names
from exo.chat.grammar.tool_schema import NamedChoice, Tool, ToolChoice
from exo.serving.request import Conversation, GenerationRequest, OutputConstraint

_SAMPLING = {"temperature", "top_k", "top_p"}


def _only_custom(value: JsonValue) -> JsonValue:
    """Drops tools that Anthropic runs or defines, which are recognised by their type."""
    if value is None:
        raise invalid("must be a tool, an object with a name and an input_schema")
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind in (None, "custom"):
        return value
    note(f"tools.{str(kind)[:64]}", "is left out, since only Anthropic's own models have this tool")
    return None


class AnthropicTool(RequestBody):
    """A tool that the client runs."""

    ignored: ClassVar[Unsupported] = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "input_examples": ([],),
    }

    type: Literal["custom"] = Field(default="custom", description="Anthropic's own tools are dropped.")
    name: ToolName = Field(description="The name by which the model calls it.")
    description: str = Field(default="", description="A description for the model.")
    input_schema: Parameters = Field(description="JSON Schema of the input, an object.")
    strict: bool = Field(default=False, description="Has no effect: a required call always follows the schema.")
    cache_control: CacheControl | None = Field(default=None, description="Has no effect: all prompts are cached.")
    eager_input_streaming: bool | None = Field(default=None, description="Has no effect: inputs are always streamed.")

    def tool(self) -> Tool:
        """The tool in no API's form."""
        return Tool(self.name, self.description, self.input_schema)


class AnthropicToolChoice(RequestBody):
    """Whether the reply may, must or must not call a tool."""

    type: Literal["auto", "any", "tool", "none"] = Field(
        description="any requires a call of some tool, tool one of the named tool."
    )
    name: str | None = Field(default=None, description="The tool to call; only with type 'tool'.")
    disable_parallel_tool_use: bool = Field(default=False, description="Allow at most one call in the reply.")

    @model_validator(mode="after")
    def _name_where_due(self) -> "AnthropicToolChoice":
        if self.type == "tool" and self.name is None:
            raise missing("name")
        if self.type != "tool" and self.name is not None:
            raise invalid(f"not accepted where type is {self.type!r}", "name")
        return self


class AnthropicThinkingConfig(RequestBody):
    """Whether the model should reason first."""

    type: Literal["enabled", "disabled", "adaptive"] = Field(
        description="With adaptive, or without a thinking field, the model decides."
    )
    budget_tokens: int | None = Field(
        default=None,
        ge=1,
        description="The most tokens of reasoning. With interleaved thinking, clients send more than max_tokens.",
    )
    display: Literal["summarized", "omitted"] = Field(
        default="summarized", description="Whether the reply contains the reasoning: all of it, or with 'omitted' none."
    )

    @model_validator(mode="after")
    def _budget_where_due(self) -> "AnthropicThinkingConfig":
        if self.type != "enabled" and self.budget_tokens is not None:
            raise invalid(f"not accepted where type is {self.type!r}", "budget_tokens")
        return self


class AnthropicOutputFormat(RequestBody):
    """The format of the reply."""

    type: Literal["json_schema"] = Field(description="The only supported type.")
    schema_: dict[str, JsonValue] = Field(alias="schema", description="A JSON Schema.")


class AnthropicOutputConfig(RequestBody):
    """Settings of the reply."""

    ignored: ClassVar[Unsupported] = {"task_budget": ()}

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None,
        description="The reasoning effort, which also limits the reasoning without budget_tokens; max means xhigh.",
    )
    format: AnthropicOutputFormat | None = Field(
        default=None, description="A JSON Schema that the reply follows.", json_schema_extra=honoured("grammar")
    )


class AnthropicMetadata(RequestBody):
    """Metadata of the request."""

    user_id: str | None = Field(default=None, description="Has no effect.")


_IGNORED: Unsupported = {
    "betas": ([],),
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
    "thread": (),
    "user_profile_id": (),
    "workspace_id": (),
}
_OF_GENERATION: Unsupported = dict.fromkeys(
    ("max_tokens", "temperature", "top_p", "top_k", "stop_sequences", "stream", "metadata", "service_tier"), ()
)
"""Fields that do not change the number of prompt tokens."""


class CountTokensRequest(RequestBody):
    """The body of ``POST /v1/messages/count_tokens``: the fields that make a prompt."""

    ignored: ClassVar[Unsupported] = {**_IGNORED, **_OF_GENERATION}

    model: str = Field(min_length=1, max_length=300, description="A model id or alias, optionally with @runner.")
    messages: Annotated[
        list[AnthropicMessage], BeforeValidator(readable, json_schema_input_type=list[AnthropicMessage])
    ] = Field(
        min_length=1,
        max_length=10_000,
        description="The conversation. If the last message is the assistant's, the reply continues it.",
    )
    system: PlainContent = Field(default=[], description="The first message: text, as a string or in blocks.")
    tools: list[
        Annotated[AnthropicTool | None, BeforeValidator(_only_custom, json_schema_input_type=AnthropicTool)]
    ] = Field(default=[], max_length=MAX_TOOLS, description="The tools that the model may call.")
    tool_choice: AnthropicToolChoice | None = Field(
        default=None,
        description="With type 'any' or 'tool', the reply is a call that follows its input_schema.",
        json_schema_extra=honoured("grammar"),
    )
    thinking: AnthropicThinkingConfig | None = Field(default=None, description="Whether the model should reason first.")
    output_config: AnthropicOutputConfig = Field(default=AnthropicOutputConfig(), description="Settings of the reply.")
    cache_control: CacheControl | None = Field(default=None, description="Has no effect: all prompts are cached.")

    @model_validator(mode="after")
    def _results_answer_calls(self) -> "CountTokensRequest":
        check_results(self.messages)
        if any(isinstance(block, ToolUseBlock) for block in self.messages[-1].content):
            raise invalid("the last message has tool_use blocks, which need tool_result blocks after them", "messages")
        return self

    @model_validator(mode="after")
    def _a_choice_of_tools(self) -> "CountTokensRequest":
        check_tool_names([tool.name for tool in self.own_tools], self._choice, "tool_choice.name")
        return self

    def conversation(self) -> Conversation:
        """The prompt in no API's form."""
        effort, param = self._effort
        choice = self.tool_choice
        return Conversation(
            messages=told(plain_text(self.system), self.messages),
            pictures=self.pictures,
            tools=tuple(tool.tool() for tool in self.own_tools) if self._choice != "none" else (),
            choice=self._choice,
            parallel=choice is None or not choice.disable_parallel_tool_use,
            effort=effort,
            effort_param=param,
            reasoning_tokens=self.thinking.budget_tokens if self.thinking is not None else None,
            reasoning_tokens_param="thinking.budget_tokens",
            continues=self.messages[-1].role == "assistant",
        )

    @property
    def own_tools(self) -> list[AnthropicTool]:
        """The tools that the client runs."""
        return [tool for tool in self.tools if tool is not None]

    @property
    def _choice(self) -> ToolChoice:
        choice = self.tool_choice
        if choice is None or choice.type == "auto":
            return "auto"
        if choice.name is not None:
            return NamedChoice(choice.name)
        return "required" if choice.type == "any" else "none"

    @property
    def _effort(self) -> tuple[str | None, str]:
        """The reasoning effort, and the field that sets it."""
        kind = self.thinking.type if self.thinking is not None else "adaptive"
        effort = self.output_config.effort
        if kind == "disabled":
            return "none", "thinking"
        if effort is not None:
            return ("xhigh" if effort == "max" else effort), "output_config.effort"
        return ("on" if kind == "enabled" else None), "thinking"


class MessagesRequest(CountTokensRequest):
    """The body of ``POST /v1/messages``. If it does not set a field, the model card decides, then the default."""

    ignored: ClassVar[Unsupported] = _IGNORED

    max_tokens: Annotated[int | None, NoLimit] = Field(
        ge=0, le=1 << 31, description="-1: until the context is full. 0 only computes and caches the prompt."
    )
    temperature: float = Field(default=1.0, ge=0, le=1, description="0 always takes the most probable token.")
    top_p: TopP = Field(default=1.0, description="Keep the most probable tokens up to this sum; 0 keeps one.")
    top_k: TopK = Field(default=0, description="Keep this many tokens; 0 or -1 keeps all.")
    stop_sequences: Stops = Field(default=[], description="A string or up to 16 strings that end the reply.")
    stream: bool = Field(default=False, description="Send the reply while it is generated, as server-sent events.")
    metadata: AnthropicMetadata | None = Field(default=None, description="Has no effect.")
    service_tier: str = Field(default="auto", description="Has no effect.")

    @model_validator(mode="after")
    def _one_constraint(self) -> "MessagesRequest":
        if self.output_config.format is not None and self._choice not in ("auto", "none"):
            raise invalid("not accepted together with output_config.format", "tool_choice")
        return self

    @property
    def shows_thinking(self) -> bool:
        """Whether the reply contains the model's reasoning."""
        return self.thinking is None or self.thinking.display != "omitted"

    def request(self) -> GenerationRequest:
        """The request in no API's form."""
        format_ = self.output_config.format
        constraint = None
        if format_ is not None:
            schema = to_json(format_.schema_).decode()
            constraint = OutputConstraint("json_schema", schema, "output_config.format.schema")
        sampling: dict[str, Any] = self.model_dump(include=_SAMPLING, exclude_unset=True)
        return GenerationRequest(
            prompts=(self.conversation(),),
            prompt_field="messages",
            sampling=sampling,
            stop=tuple(self.stop_sequences),
            max_tokens=self.max_tokens,
            constraint=constraint,
        )
