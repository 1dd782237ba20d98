"""OpenAI's chat requests, and the format of the reply."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import to_json

from exo.api.http.body import RequestBody, Unsupported, few, honoured, invalid, missing
from exo.api.openai.common_request import UNSUPPORTED, GenerationFields, NoLimit
from exo.api.openai.messages import ChatMessages
from exo.api.openai.tools import (
    MAX_TOOLS,
    AllowedFunctions,
    NamedTool,
    ToolDefinition,
    VendorTool,
    check_tool_names,
    choice_by_type,
    tool_by_type,
)
from exo.chat.grammar.tool_schema import NamedChoice, ToolChoice
from exo.serving.request import Conversation, GenerationRequest, OutputConstraint
from exo.worker.protocol.messages import MAX_LOGPROBS

_ANY_OBJECT = '{"type":"object"}'


Effort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh"],
    BeforeValidator(
        lambda effort: "xhigh" if effort == "max" else effort,
        json_schema_input_type=Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"],
    ),
]
MaxReasoningTokens = Annotated[
    int | None,
    Field(ge=0, le=1 << 31, description="The most tokens of reasoning, in place of what the reasoning effort allows."),
]


class JsonSchema(RequestBody):
    """A JSON Schema that the reply must follow, whether ``strict`` or not."""

    name: JsonValue = Field(default=None, description="Has no effect.")
    description: JsonValue = Field(default=None, description="Has no effect.")
    schema_: dict[str, JsonValue] | bool = Field(default=True, alias="schema", description="A JSON Schema.")
    strict: bool | None = Field(default=None, description="Has no effect: the schema is always followed.")


class ResponseFormat(RequestBody):
    """The format of the reply."""

    unsupported: ClassVar[Unsupported] = {"grammar": ("",)}

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="Anything, any JSON object, or JSON that follows json_schema."
    )
    json_schema: JsonSchema | None = Field(
        default=None, description="Required with the type of its name, and not allowed with others."
    )
    schema_: dict[str, JsonValue] | bool | None = Field(
        default=None, alias="schema", description="A JSON Schema, as in llama-server; not allowed with the type text."
    )

    @model_validator(mode="after")
    def _schema_where_due(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise missing("json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise invalid(f"not accepted where type is {self.type!r}", "json_schema")
        if self.schema_ is not None and (self.type == "text" or self.json_schema is not None):
            other = f"where type is {self.type!r}" if self.type == "text" else "together with json_schema"
            raise invalid(f"not accepted {other}", "schema")
        return self

    @property
    def constraint(self) -> OutputConstraint | None:
        """The constraint on the output."""
        if self.type == "text":
            return None
        if self.schema_ is not None:
            return OutputConstraint("json_schema", to_json(self.schema_).decode(), "response_format.schema")
        if self.json_schema is None:
            return OutputConstraint("json_schema", _ANY_OBJECT, "response_format")
        schema = to_json(self.json_schema.schema_).decode()
        return OutputConstraint("json_schema", schema, "response_format.json_schema.schema")


class ThinkingSwitch(RequestBody):
    """The reasoning switch of DeepSeek and others."""

    ignored: ClassVar[Unsupported] = {"clear_thinking": (True,), "keep": ()}

    type: Literal["enabled", "disabled", "adaptive", "auto"] = Field(description="Whether the model should reason.")
    budget_tokens: int | None = Field(default=None, ge=1, description="The most tokens of reasoning.")


class ReasoningSwitch(RequestBody):
    """OpenRouter's reasoning settings."""

    ignored: ClassVar[Unsupported] = {"exclude": (False,), "summary": ("auto",)}

    effort: Effort | None = Field(default=None, description="The reasoning effort.")
    enabled: bool | None = Field(default=None, description="Whether the model should reason.")
    max_tokens: int | None = Field(default=None, ge=0, description="The most tokens of reasoning.")


class ChatCompletionRequest(GenerationFields):
    """The body of ``POST /v1/chat/completions``."""

    unsupported: ClassVar[Unsupported] = {**UNSUPPORTED, "echo": (False,), "suffix": ("",)}

    messages: ChatMessages = Field(min_length=1, max_length=10_000, description="The conversation.")
    max_completion_tokens: Annotated[int | None, NoLimit] = Field(
        default=None, ge=1, le=1 << 31, description="Newer name of max_tokens."
    )
    logprobs: bool = Field(
        default=False, description="Return the log-probability of each token.", json_schema_extra=honoured("logprobs")
    )
    top_logprobs: int = Field(
        default=0, ge=0, le=MAX_LOGPROBS, description="Also return this many alternatives; needs logprobs."
    )
    response_format: ResponseFormat | None = Field(
        default=None, description="The format of the reply.", json_schema_extra=honoured("grammar")
    )
    tools: list[Annotated[ToolDefinition | VendorTool, BeforeValidator(tool_by_type)]] = Field(
        default=[], max_length=MAX_TOOLS, description="The tools that the model may call; other types are dropped."
    )
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool | AllowedFunctions, BeforeValidator(choice_by_type)
    ] = Field(
        default="auto",
        description="With 'required' or a name, the reply is a call that follows its schema.",
        json_schema_extra=honoured("grammar"),
    )
    parallel_tool_calls: bool = Field(default=True, description="Whether one reply may have several calls.")
    reasoning_effort: Effort | None = Field(
        default=None, description="The reasoning effort, if the model reasons; max means xhigh."
    )
    max_reasoning_tokens: MaxReasoningTokens = None
    reasoning: ReasoningSwitch | None = Field(default=None, description="OpenRouter's name of reasoning_effort.")
    thinking: ThinkingSwitch | None = Field(default=None, description="DeepSeek's switch of reasoning.")
    enable_thinking: bool | None = Field(default=None, description="Qwen's switch of reasoning.")
    chat_template_kwargs: Annotated[dict[str, JsonValue], BeforeValidator(few)] = Field(
        default={}, description="Variables for the chat template, such as enable_thinking."
    )
    continue_final_message: bool = Field(
        default=False, description="Continue the last message, which must be the assistant's."
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="Must be true without continue_final_message and false with it."
    )

    @property
    def constraints(self) -> list[OutputConstraint]:
        found = [self.response_format.constraint] if self.response_format is not None else []
        return [each for each in found if each is not None] + super().constraints

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatCompletionRequest":
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise invalid("differs from max_tokens; give one of the two", "max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise invalid("only allowed where logprobs is true", "top_logprobs")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise invalid("the last message is not the assistant's", "continue_final_message")
        if self.add_generation_prompt == self.continue_final_message:
            other = f"where continue_final_message is {to_json(self.continue_final_message).decode()}"
            raise invalid(
                f"must be {to_json(not self.continue_final_message).decode()} {other}", "add_generation_prompt"
            )
        return self

    @model_validator(mode="after")
    def _a_choice_of_tools(self) -> "ChatCompletionRequest":
        names = [tool.function.name for tool in self.functions]
        check_tool_names(names, self.choice, "tool_choice.function.name")
        if isinstance(self.tool_choice, AllowedFunctions) and (missing := self.tool_choice.names - {*names}):
            message = f"there is no tool {min(missing)[:80]!r}; given are {', '.join(names)[:500] or 'none'}"
            raise invalid(message, "tool_choice.allowed_tools")
        if self.choice not in ("auto", "none"):
            if other := super().constraints:
                raise invalid(f"not accepted together with {other[0].param}", "tool_choice")
            if self.constraints:
                self.note("response_format", "has no effect, because tool_choice demands a call")
        return self

    @property
    def effort(self) -> tuple[str | None, str]:
        """The reasoning effort, and the field that sets it."""
        if self.reasoning_effort is not None:
            return self.reasoning_effort, "reasoning_effort"
        if self.reasoning is not None and self.reasoning.effort is not None:
            return self.reasoning.effort, "reasoning.effort"
        if self.reasoning is not None and self.reasoning.enabled is not None:
            return ("on" if self.reasoning.enabled else "none"), "reasoning.enabled"
        if self.thinking is not None and self.thinking.type in ("enabled", "disabled"):
            return ("on" if self.thinking.type == "enabled" else "none"), "thinking"
        if self.enable_thinking is not None:
            return ("on" if self.enable_thinking else "none"), "enable_thinking"
        return None, "reasoning_effort"

    @property
    def reasoning_tokens(self) -> tuple[int | None, str]:
        """The most tokens of reasoning, and the field that sets it."""
        if self.max_reasoning_tokens is None and self.reasoning is not None and self.reasoning.max_tokens is not None:
            return self.reasoning.max_tokens, "reasoning.max_tokens"
        if self.max_reasoning_tokens is None and self.thinking is not None and self.thinking.budget_tokens is not None:
            return self.thinking.budget_tokens, "thinking.budget_tokens"
        return self.max_reasoning_tokens, "max_reasoning_tokens"

    @property
    def functions(self) -> list[ToolDefinition]:
        """The tools that the model sees."""
        return [tool for tool in self.tools if isinstance(tool, ToolDefinition)]

    @property
    def choice(self) -> ToolChoice:
        """The choice of tools in no API's form."""
        if isinstance(self.tool_choice, NamedTool):
            return NamedChoice(self.tool_choice.function.name)
        return (
            self.tool_choice.allowed_tools.mode if isinstance(self.tool_choice, AllowedFunctions) else self.tool_choice
        )

    @property
    def callable_functions(self) -> list[ToolDefinition]:
        """The tools that this reply may call."""
        if isinstance(self.tool_choice, AllowedFunctions):
            return [tool for tool in self.functions if tool.function.name in self.tool_choice.names]
        return self.functions if self.tool_choice != "none" else []

    def conversation(self) -> Conversation:
        """The prompt in no API's form."""
        effort, effort_param = self.effort
        reasoning_tokens, reasoning_tokens_param = self.reasoning_tokens
        return Conversation(
            pictures=self.pictures,
            messages=tuple(message.told() for message in self.messages),
            tools=tuple(tool.function.tool() for tool in self.callable_functions),
            choice=self.choice,
            parallel=self.parallel_tool_calls,
            variables=self.chat_template_kwargs,
            effort=effort,
            effort_param=effort_param,
            reasoning_tokens=reasoning_tokens,
            reasoning_tokens_param=reasoning_tokens_param,
            continues=self.continue_final_message,
        )

    def request(self) -> GenerationRequest:
        """The request in no API's form."""
        limit = self.max_completion_tokens or self.max_tokens
        logprobs = self.top_logprobs if self.logprobs else None
        return self.generation_request((self.conversation(),), "messages", limit, logprobs)
