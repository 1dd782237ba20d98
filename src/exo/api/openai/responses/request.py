"""OpenAI's responses: the request."""

from functools import cached_property
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import to_json

from exo.api.http.body import MODEL, RequestBody, Unsupported, few, honoured, invalid
from exo.api.openai.chat_request import Effort, MaxReasoningTokens
from exo.api.openai.common_request import FrequencyPenalty, NoLimit, PresencePenalty, TopP
from exo.api.openai.responses.input import Input
from exo.api.openai.responses.tools import (
    AllowedTools,
    NamedResponsesTool,
    OfferedTool,
    ResponsesChoice,
    ResponsesTools,
    by_type,
    offered,
)
from exo.api.openai.tools import MAX_TOOLS
from exo.chat.grammar.tool_schema import NamedChoice, Tool, ToolChoice
from exo.serving.request import OutputConstraint
from exo.worker.protocol.messages import MAX_LOGPROBS

LOGPROBS = "message.output_text.logprobs"


class TextFormat(RequestBody):
    """The format of the text."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        default="text", description="Anything, any JSON object, or JSON that follows schema."
    )
    name: str = Field(default="", description="Has no effect.")
    description: JsonValue = Field(default=None, description="Has no effect.")
    schema_: dict[str, JsonValue] | bool | None = Field(
        default=None,
        alias="schema",
        description="A JSON Schema; required with the type json_schema, and not allowed with others.",
    )
    strict: bool | None = Field(default=None, description="Has no effect: the schema is always followed.")

    @model_validator(mode="after")
    def _schema_where_due(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise invalid("goes with the type json_schema and no other", "schema")
        return self

    @property
    def constraint(self) -> OutputConstraint | None:
        """The constraint on the output."""
        if self.type == "text":
            return None
        schema = {"type": "object"} if self.schema_ is None else self.schema_
        where = "text.format" if self.schema_ is None else "text.format.schema"
        return OutputConstraint("json_schema", to_json(schema).decode(), where)


class TextConfig(RequestBody):
    """Settings of the text."""

    ignored: ClassVar[Unsupported] = {"verbosity": ("medium",)}

    format: TextFormat = Field(
        default=TextFormat(), description="The format of the text.", json_schema_extra=honoured("grammar")
    )


class ReasoningConfig(RequestBody):
    """Settings of the reasoning."""

    ignored: ClassVar[Unsupported] = {"generate_summary": ("auto",), "summary": ("auto", "none")}

    effort: Effort | None = Field(
        default=None, description="For models whose chat template has levels or a switch; max means xhigh."
    )


class ResponsesRequest(RequestBody):
    """The body of ``POST /v1/responses``."""

    unsupported: ClassVar[Unsupported] = {"background": (False,), "conversation": (), "prompt": ()}
    ignored: ClassVar[Unsupported] = {
        "client_metadata": ({},),
        "context_management": ([],),
        "max_tool_calls": (),
        "prompt_cache_options": ({},),
        "prompt_cache_retention": ("in_memory", "in-memory"),
        "service_tier": ("auto", "default"),
        "stream_options": ({}, {"include_obfuscation": False}),
    }

    model: str = MODEL
    input: Input = Field(
        min_length=1, max_length=10_000, description="The user's message, or items: messages, calls and their outputs."
    )
    instructions: str | None = Field(default=None, description="A system message that is not stored.")
    previous_response_id: str | None = Field(
        default=None, max_length=256, description="Continue after this response, if it is still in the server's memory."
    )
    store: bool = Field(
        default=True, description="Keep input and output in memory until newer responses need the space."
    )
    stream: bool = Field(default=False, description="Send the reply while it is generated, as server-sent events.")
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 always takes the most probable token.")
    top_p: TopP = Field(default=1.0, description="Keep the most probable tokens up to this sum; 0 keeps one.")
    presence_penalty: PresencePenalty = 0.0
    frequency_penalty: FrequencyPenalty = 0.0
    max_output_tokens: Annotated[int | None, NoLimit] = Field(
        default=None, ge=1, le=1 << 31, description="Null or -1: until the context is full."
    )
    truncation: Literal["disabled", "auto"] = Field(
        default="disabled",
        description="auto has no effect: a conversation that is too long is refused and never truncated.",
    )
    tools: ResponsesTools = Field(
        default=[], max_length=MAX_TOOLS, description="The tools that the model may call; other types are dropped."
    )
    tool_choice: Annotated[ResponsesChoice, BeforeValidator(by_type)] = Field(
        default="auto",
        description="With 'required' or a name, the reply is a call that follows its schema.",
        json_schema_extra=honoured("grammar"),
    )
    parallel_tool_calls: bool = Field(default=True, description="Whether one reply may have several calls.")
    text: TextConfig = Field(default=TextConfig(), description="Settings of the text.")
    max_reasoning_tokens: MaxReasoningTokens = None
    reasoning: ReasoningConfig = Field(default=ReasoningConfig(), description="Settings of the reasoning.")
    include: list[str] = Field(
        default=[],
        max_length=64,
        description=f"{LOGPROBS}: each token's log-probability. Others have no effect: reasoning is not encrypted, and "
        "OpenAI's own tools are not there.",
        json_schema_extra=honoured("logprobs"),
    )
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS, description=f"Needs {LOGPROBS} in include.")
    metadata: Annotated[dict[str, JsonValue], BeforeValidator(few)] = Field(
        default={}, description="Returned unchanged."
    )
    user: JsonValue = Field(default=None, description="Has no effect.")
    prompt_cache_key: str | None = Field(default=None, description="Returned unchanged: all prompts are cached.")
    safety_identifier: str | None = Field(default=None, description="Returned unchanged.")

    @model_validator(mode="after")
    def _a_choice_of_tools(self) -> "ResponsesRequest":
        names = [each.tool.name for each in self.offered]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise invalid(f"two tools have the same name, {twice!r}", "tools")
        wanted = [] if isinstance(self.tool_choice, str) else self.tool_choice.told_names
        for name in wanted:
            if name not in names:
                raise invalid(
                    f"there is no tool {name[:80]!r}; given are {', '.join(names)[:500] or 'none'}", "tool_choice"
                )
        if any(each.has_grammar and self.choice == NamedChoice(each.tool.name) for each in self.offered):
            raise invalid("the grammar of a custom tool cannot be enforced", "tool_choice")
        callable_names = [tool.name for tool in self.callable_tools]
        for each in self.offered:
            if each.has_grammar and each.tool.name in callable_names:
                self.note(f"tools.{each.name}.format", "is told to the model and not enforced: its input is any text")
        if self.choice == "required" and not names:
            raise invalid("there are no tools to choose from", "tool_choice")
        if self.choice not in ("auto", "none") and self.text.format.constraint is not None:
            self.note("text.format", "has no effect, because tool_choice demands a call")
        return self

    @model_validator(mode="after")
    def _logprobs_are_included(self) -> "ResponsesRequest":
        if self.top_logprobs and not self.logprobs:
            raise invalid(f"only allowed where include has {LOGPROBS}", "top_logprobs")
        for each in self.include:
            if each not in (LOGPROBS, "reasoning.encrypted_content"):
                self.note("include", f"{each[:80]!r} has no effect")
        if self.truncation == "auto":
            self.note("truncation", "'auto' has no effect: a conversation that is too long is refused, and never cut")
        return self

    @property
    def logprobs(self) -> bool:
        """Whether the reply contains log-probabilities."""
        return LOGPROBS in self.include

    @property
    def choice(self) -> ToolChoice:
        """The choice of tools in no API's form."""
        match self.tool_choice:
            case NamedResponsesTool():
                return NamedChoice(self.tool_choice.told_name)
            case AllowedTools():
                return self.tool_choice.mode
            case _:
                return self.tool_choice

    @cached_property
    def offered(self) -> tuple[OfferedTool, ...]:
        """All tools, under the names that the model sees."""
        return tuple(offered(self.tools))

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that may be called, in no API's form."""
        if self.tool_choice == "none":
            return ()
        tools = tuple(each.tool for each in self.offered)
        if isinstance(self.tool_choice, AllowedTools):
            allowed = self.tool_choice.told_names
            return tuple(tool for tool in tools if tool.name in allowed)
        return tools
