"""OpenAI's requests: fields that are supported, ignored with a warning, or refused.

Values are not converted: a number in a string is not a number, and 1.0 is not an integer. An explicit null means the
default.
"""

from typing import Annotated, ClassVar, cast

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import to_json

from exo.api.http.body import MODEL, RequestBody, Unsupported, few, honoured, invalid
from exo.serving.request import GenerationRequest, Infill, OutputConstraint, WantedAdapter
from exo.serving.request import Prompt as AnyPrompt
from exo.worker.protocol.commands import SamplingParams
from exo.worker.protocol.messages import MAX_LOGPROBS

_SAMPLING = set(SamplingParams.model_fields) - {"seed", "logit_bias", "allowed", "repetition_window"}
MAX_CHOICES = 1024
"""The maximum of prompts times ``n``."""
MAX_INPUTS = 2048
"""The maximum of texts to embed."""
MAX_DOCUMENTS = 1024
"""The maximum of texts to rank."""
UNSUPPORTED: Unsupported = {
    "add_special_tokens": (False,),
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "n_probs": (0,),
    "prompt_logprobs": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""Fields of other servers that are not supported, and the values that request nothing, besides null."""
OF_CHAT: Unsupported = {"response_format": ({"type": "text"},), "tools": ([],)}
"""Fields of chat completions that change the answer. Completions do not have them."""
IGNORED: Unsupported = {
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "extra_body": ({},),
    "id_slot": (-1,),
    "mirostat": (0,),
    "parse_tool_calls": (True,),
    "post_sampling_probs": (False,),
    "prediction": (),
    "priority": (0,),
    "prompt_cache_options": ({},),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "reasoning_format": ("auto", "deepseek"),
    "return_progress": (False,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "top_n_sigma": (-1,),
    "typical_p": (1,),
    "verbosity": ("medium",),
    "web_search_options": (),
    "xtc_probability": (0,),
    "xtc_threshold": (0.1,),
}
"""Fields of other servers that do not change the answer, and the values that need no warning."""
_FORBIDDEN = -100
_LEAST_TOP_P = 1e-6
"""Less than the probability of the most probable token of any vocabulary. A sum of 0 would keep no token."""

TokenIdText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TopP = Annotated[float, Field(ge=0, le=1), AfterValidator(lambda share: max(share, _LEAST_TOP_P))]
"""0, like every value below the probability of the most probable token, keeps that token alone."""
TopK = Annotated[int, Field(ge=-1, le=1 << 31), AfterValidator(lambda count: max(count, 0))]
"""-1 means all tokens, as in vLLM and others."""
MinP = Annotated[float, Field(ge=0, le=1, description="Drop tokens below this fraction of the largest probability.")]
PresencePenalty = Annotated[float, Field(ge=-2, le=2, description="Against tokens already in the reply.")]
FrequencyPenalty = Annotated[
    float, Field(ge=-2, le=2, description="The same, multiplied by the number of occurrences.")
]
LastTokens = Annotated[
    int | None,
    Field(ge=-1, le=1 << 30, description="The repetition penalty counts so many of the last tokens; -1: all, 0: none."),
]
Seed = Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 64, description="Same seed, same tokens.")]


def penalty_window(last: int) -> dict[str, float]:
    """The sampling parameters for a repetition penalty that counts so many of the last tokens."""
    return {"repetition_window": max(last, 0)} if last else {"repetition_penalty": 1.0}


def _stops(value: JsonValue) -> JsonValue:
    """Returns a list without empty strings, which some clients send instead of leaving the field out."""
    values = [value] if isinstance(value, str) else value
    return [each for each in values if each != ""] if isinstance(values, list) else values


def _pairs(value: JsonValue) -> JsonValue:
    """A table of llama-server's pairs of token id and bias, in which false forbids a token."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return value
    pairs = cast(list[tuple[JsonValue, JsonValue]], value)
    return {str(token): _FORBIDDEN if bias is False else bias for token, bias in pairs}


def _no_limit(value: JsonValue) -> JsonValue:
    """-1 means no limit, as in llama-server and others."""
    return None if value == -1 and isinstance(value, int) else value


NoLimit = BeforeValidator(_no_limit)
Stops = Annotated[list[StopText], BeforeValidator(_stops, json_schema_input_type=str | list[str]), Field(max_length=16)]


class StreamOptions(RequestBody):
    """The contents of a stream besides its text."""

    ignored: ClassVar[Unsupported] = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}

    include_usage: bool = Field(default=False, description="End the stream with a chunk that contains the usage.")


def grammar_constraint(source: str, param: str) -> OutputConstraint:
    """A grammar in GBNF or Lark. Only GBNF has the sign "::="."""
    return OutputConstraint("gbnf" if "::=" in source else "lark", source, param)


def _literal(text: str) -> str:
    """A string in llguidance's Lark, which is written as in JSON."""
    return to_json(text).decode()


def _choice_constraint(texts: list[str], param: str) -> OutputConstraint:
    return OutputConstraint("lark", f"start: {' | '.join(map(_literal, texts))}", param)


def _schema_text(schema: JsonValue) -> str:
    return schema if isinstance(schema, str) else to_json(schema).decode()


class StructuredOutputs(RequestBody):
    """The constraint on the output: exactly one of these fields."""

    json_: JsonValue = Field(default=None, alias="json", description="A JSON Schema, as an object or as its text.")
    regex: str | None = Field(default=None, min_length=1, description="In Rust's notation, without look-around.")
    choice: list[str] | None = Field(default=None, min_length=1, max_length=1024, description="Any one of these texts.")
    grammar: str | None = Field(default=None, min_length=1, description="In GBNF or in llguidance's Lark.")

    @model_validator(mode="after")
    def _exactly_one(self) -> "StructuredOutputs":
        if len(self.model_fields_set) != 1:
            raise invalid("give exactly one of json, regex, choice and grammar")
        return self

    @property
    def constraint(self) -> OutputConstraint:
        """The field that is set."""
        where = "structured_outputs"
        if self.regex is not None:
            return OutputConstraint("regex", self.regex, f"{where}.regex")
        if self.choice is not None:
            return _choice_constraint(self.choice, f"{where}.choice")
        if self.grammar is not None:
            return grammar_constraint(self.grammar, f"{where}.grammar")
        return OutputConstraint("json_schema", _schema_text(self.json_), f"{where}.json")


class LoraScale(RequestBody):
    """An adapter of the model, by its number or its name."""

    id: int | None = Field(default=None, ge=0, description="Its number in the list of /lora-adapters.")
    name: str = Field(default="", max_length=100, description="Its name in the model card.")
    scale: float = Field(ge=-100, le=100, description="The factor of what it changes, instead of the model card's.")

    @model_validator(mode="after")
    def _one_of_both(self) -> "LoraScale":
        if (self.id is None) == (self.name == ""):
            raise invalid("give either id or name")
        return self


class GenerationFields(RequestBody):
    """Common fields of both endpoints. If a request does not set one, the model card decides, then the default."""

    unsupported: ClassVar[Unsupported] = UNSUPPORTED
    ignored: ClassVar[Unsupported] = IGNORED

    model: str = MODEL
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 always takes the most probable token.")
    top_p: TopP = Field(default=1.0, description="Keep the most probable tokens up to this sum; 0 keeps one.")
    top_k: TopK = Field(default=0, description="Keep this many tokens; 0 or -1 keeps all.")
    min_p: MinP = 0.0
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100, description="1 is none.")
    repeat_penalty: float | None = Field(
        default=None, ge=0.01, le=100, description="llama-server's name of repetition_penalty."
    )
    repeat_last_n: LastTokens = None
    repetition_context_size: int | None = Field(
        default=None, ge=0, le=1 << 30, description="mlx-lm's name of repeat_last_n, in which 0 means all."
    )
    presence_penalty: PresencePenalty = 0.0
    frequency_penalty: FrequencyPenalty = 0.0
    logit_bias: Annotated[dict[TokenIdText, Bias], BeforeValidator(few), BeforeValidator(_pairs)] = Field(
        default={}, description="Added to the logits of these token ids."
    )
    seed: Seed = None
    stop: Stops = Field(default=[], description="A string or up to 16 strings that end the reply.")
    stop_token_ids: list[TokenId] = Field(
        default=[], max_length=1024, description="Further tokens that end the reply, of which they are no part."
    )
    include_stop_str_in_output: bool = Field(
        default=False, description="The reply ends with the stop string or stop token instead of before it."
    )
    allowed_token_ids: list[TokenId] = Field(
        default=[], max_length=1 << 17, description="No other tokens are chosen. Empty: all may be."
    )
    max_tokens: Annotated[int | None, NoLimit] = Field(
        default=None, ge=1, le=1 << 31, description="Null or -1: until the context is full."
    )
    min_tokens: int = Field(
        default=0,
        ge=0,
        le=1 << 31,
        description="Nothing but a limit or a grammar ends the output within its first tokens, this many.",
    )
    ignore_eos: bool = Field(default=False, description="End-of-generation tokens are never chosen.")
    cache_prompt: bool = Field(
        default=True, description="If false, the whole prompt is computed, even if the prefix cache has it."
    )
    use_prefix_cache: bool = Field(default=True, description="Upstream exo's name of cache_prompt.")
    grammar: str | None = Field(
        default=None,
        min_length=1,
        description="The output must match this grammar, in GBNF or in llguidance's Lark.",
        json_schema_extra=honoured("grammar"),
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="The same in vLLM's form.", json_schema_extra=honoured("grammar")
    )
    json_schema: dict[str, JsonValue] | None = Field(
        default=None, description="The same in llama-server's form.", json_schema_extra=honoured("grammar")
    )
    guided_json: JsonValue = Field(default=None, description="Older name of structured_outputs.json.")
    guided_regex: str | None = Field(default=None, min_length=1, description="Older name of structured_outputs.regex.")
    guided_choice: list[str] | None = Field(
        default=None, min_length=1, max_length=1024, description="Older name of structured_outputs.choice."
    )
    guided_grammar: str | None = Field(
        default=None, min_length=1, description="Older name of structured_outputs.grammar."
    )
    lora: list[LoraScale] = Field(
        default=[],
        max_length=100,
        description="Adapters to use together, instead of one behind the model's name.",
        json_schema_extra=honoured("adapter_scales"),
    )
    return_token_ids: bool = Field(default=False, description="Return the ids of the generated tokens.")
    timings_per_token: bool = Field(
        default=False, description="Add llama-server's timings to the reply, or to each chunk of a stream."
    )
    n: int = Field(default=1, ge=1, le=16, description="Choices for each prompt.")
    stream: bool = Field(default=False, description="Send the reply while it is generated, as server-sent events.")
    stream_options: StreamOptions = Field(
        default=StreamOptions(), description="The contents of a stream besides its text."
    )
    user: JsonValue = Field(default=None, description="Has no effect.")
    metadata: JsonValue = Field(default=None, description="Has no effect.")
    prompt_cache_key: JsonValue = Field(default=None, description="Has no effect: all prompts are cached.")
    safety_identifier: JsonValue = Field(default=None, description="Has no effect.")

    @property
    def constraints(self) -> list[OutputConstraint]:
        """All constraints on the output. At most one is allowed."""
        found = [self.structured_outputs.constraint] if self.structured_outputs is not None else []
        if self.grammar is not None:
            found.append(grammar_constraint(self.grammar, "grammar"))
        if self.guided_grammar is not None:
            found.append(grammar_constraint(self.guided_grammar, "guided_grammar"))
        if self.guided_regex is not None:
            found.append(OutputConstraint("regex", self.guided_regex, "guided_regex"))
        if self.guided_choice is not None:
            found.append(_choice_constraint(self.guided_choice, "guided_choice"))
        for schema, param in ((self.json_schema, "json_schema"), (self.guided_json, "guided_json")):
            if schema is not None:
                found.append(OutputConstraint("json_schema", _schema_text(schema), param))
        return found

    @property
    def sampling(self) -> dict[str, float]:
        """The sampling parameters of the request, under their names in ``SamplingParams``."""
        chosen: dict[str, float] = self.model_dump(include=_SAMPLING, exclude_unset=True)
        if self.repeat_penalty is not None:
            chosen.setdefault("repetition_penalty", self.repeat_penalty)
        if self.repetition_context_size is not None:
            chosen["repetition_window"] = self.repetition_context_size
        if self.repeat_last_n is not None:
            chosen |= penalty_window(self.repeat_last_n)
        return chosen

    @model_validator(mode="after")
    def _one_constraint(self) -> "GenerationFields":
        if len(found := self.constraints) > 1:
            both = " and ".join(each.param for each in found)
            raise invalid(f"give only one of {both}", found[1].param)
        if found and self.allowed_token_ids:
            raise invalid(f"not accepted together with {found[0].param}", "allowed_token_ids")
        return self

    def generation_request(
        self,
        prompts: tuple[AnyPrompt, ...],
        prompt_field: str,
        max_tokens: int | None,
        logprobs: int | None,
        *,
        echo: bool = False,
    ) -> GenerationRequest:
        """The request in no API's form, from the common fields and these."""
        return GenerationRequest(
            prompts=prompts,
            prompt_field=prompt_field,
            n=self.n,
            sampling=self.sampling,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            seed=self.seed,
            stop=tuple(self.stop),
            stop_tokens=tuple(self.stop_token_ids),
            show_stop=self.include_stop_str_in_output,
            allowed=tuple(self.allowed_token_ids),
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            cache_prompt=self.cache_prompt and self.use_prefix_cache,
            constraint=next(iter(self.constraints), None),
            logprobs=logprobs,
            adapters=tuple(WantedAdapter(each.id, each.name, each.scale) for each in self.lora),
            echo=echo,
        )


def prompts(value: JsonValue) -> JsonValue:
    """Makes a list of prompts of every accepted form."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise invalid("must be a string, a list of strings, a list of token ids or a list of such lists, not empty")
    return [value] if isinstance(value[0], int) else value


def _prompt(value: JsonValue) -> JsonValue:
    """Refuses wrong types here, because a union would report one error for each of its types."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_token_id, value))):
        return value
    raise invalid("each prompt must be a string or a list of token ids, not empty")


def _is_token_id(value: JsonValue) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


Prompt = Annotated[str | list[int], BeforeValidator(_prompt)]
Inputs = Annotated[
    list[Prompt],
    BeforeValidator(prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    Field(max_length=MAX_INPUTS),
]
"""Texts to embed."""


class CompletionRequest(GenerationFields):
    """The body of ``POST /v1/completions``. Special tokens in the text of a prompt are special."""

    unsupported: ClassVar[Unsupported] = {**UNSUPPORTED, **OF_CHAT}
    max_tokens: Annotated[int | None, NoLimit] = Field(
        default=None,
        ge=0,
        le=1 << 31,
        description="Null or -1: until the context is full. 0, with echo: only the prompt.",
    )
    echo: bool = Field(default=False, description="Begin the text with the prompt.")
    suffix: str = Field(
        default="", description="Fill in the text between the prompt and this; the model must have tokens for that."
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Return the log-probabilities of each token and of this many alternatives.",
        json_schema_extra=honoured("logprobs"),
    )
    prompt: Annotated[
        list[Prompt], BeforeValidator(prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    ] = Field(max_length=MAX_CHOICES, description="Each text or list of token ids is continued n times.")

    @model_validator(mode="after")
    def _not_too_many(self) -> "CompletionRequest":
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise invalid(f"the number of prompts times n must not exceed {MAX_CHOICES}", "n")
        return self

    @model_validator(mode="after")
    def _something_to_reply(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise invalid("0 is only accepted together with echo", "max_tokens")
        if self.suffix and self.echo:
            raise invalid("not accepted together with echo", "suffix")
        if self.suffix and not all(isinstance(prompt, str) for prompt in self.prompt):
            raise invalid("only accepted where the prompt is text", "suffix")
        return self

    def request(self) -> GenerationRequest:
        """The request in no API's form."""
        prompts = tuple(map(self._told, self.prompt))
        return self.generation_request(prompts, "prompt", self.max_tokens, self.logprobs, echo=self.echo)

    def _told(self, prompt: str | list[int]) -> AnyPrompt:
        if not isinstance(prompt, str):
            return tuple(prompt)
        return Infill(prefix=prompt, suffix=self.suffix) if self.suffix else prompt
