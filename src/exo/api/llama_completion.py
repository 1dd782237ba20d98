"""llama-server's ``/completion`` and ``/infill``: the requests, the replies and their streams."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, final
from uuid import uuid4

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import to_json

from exo.api.http import sse
from exo.api.http.body import RequestBody, Unsupported, honoured, invalid, read_body
from exo.api.http.errors import ErrorBody
from exo.api.http.openapi_schema import json_body
from exo.api.http.raw_route import DirectRoute
from exo.api.http.reply import ReplyChoice
from exo.api.http.response import GenerationResponse
from exo.api.openai.common_request import IGNORED, MAX_CHOICES, OF_CHAT, UNSUPPORTED, GenerationFields
from exo.api.openai.response import Reply, token_text
from exo.api.openai.timings import Stopwatch
from exo.chat.output.events import Content
from exo.serving.app_state import Services
from exo.serving.events import ChoiceDelta, ChoiceFinished, ChoiceStarted, GenerationEvent, Reason, Started
from exo.serving.generation import Generation
from exo.serving.request import GenerationRequest, Infill
from exo.serving.request import Prompt as AnyPrompt
from exo.worker.protocol.commands import SamplingParams
from exo.worker.protocol.events import TokenLogprobs, Usage
from exo.worker.protocol.messages import MAX_LOGPROBS

_ANY_SLOT = -1
"""llama-server's id of no particular slot."""
_STOP_TYPES: Mapping[Reason, Literal["eos", "limit"]] = {"stop": "eos", "length": "limit", "tool_calls": "eos"}


def _prompts(value: JsonValue) -> JsonValue:
    """A list of prompts, each a string or a list of strings and token ids.

    A list that contains a token id is one prompt; a list of strings and lists is several.
    """
    if isinstance(value, dict):
        if value.get("multimodal_data"):
            raise invalid("pictures and sound cannot be read here", "multimodal_data")
        value = value.get("prompt_string")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise invalid("must be a string, a list of token ids and strings, or a list of such prompts, not empty")
    if any(isinstance(part, int) for part in value):
        return [value]
    return [each.get("prompt_string") if isinstance(each, dict) else each for each in value]


def _prompt(value: JsonValue) -> JsonValue:
    """Refuses wrong types here, because a union would report one error for each of its types."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else []
    if parts and all(isinstance(part, str) or (type(part) is int and 0 <= part < 1 << 31) for part in parts):
        return parts
    raise invalid("each prompt must be a string, or a list of token ids and strings, not empty")


def _random(value: JsonValue) -> JsonValue:
    """-1 means a random seed."""
    return None if value == -1 and isinstance(value, int) else value


def _until_full(value: JsonValue) -> JsonValue:
    """-1 and -2 mean no limit."""
    return None if type(value) is int and value in (-1, -2) else value


class LlamaGenerationFields(GenerationFields):
    """The fields of ``/completion`` and ``/infill``, without those of the prompt."""

    unsupported: ClassVar[Unsupported] = {**UNSUPPORTED, **OF_CHAT}
    ignored: ClassVar[Unsupported] = {
        **IGNORED,
        "min_keep": (0,),
        "n_discard": (0,),
        "n_indent": (0,),
        "n_keep": (0,),
        "response_fields": ([],),
        "samplers": (),
        "t_max_predict_ms": (-1, 0),
    }

    seed: Annotated[int | None, BeforeValidator(_random)] = Field(
        default=None, ge=0, lt=1 << 64, description="Same seed, same tokens; -1 is a random one."
    )
    n_predict: Annotated[int | None, BeforeValidator(_until_full)] = Field(
        default=None,
        ge=0,
        le=1 << 31,
        description="The most tokens of the reply; -1 and -2: until the context is full; 0 only computes the prompt.",
    )
    n_probs: int = Field(
        default=0,
        ge=0,
        le=MAX_LOGPROBS,
        description="Return the log-probabilities of each token and of this many alternatives.",
        json_schema_extra=honoured("logprobs"),
    )
    post_sampling_probs: bool = Field(
        default=False, description="Only false with n_probs: log-probabilities are those before sampling."
    )
    return_tokens: bool = Field(default=False, description="Return the ids of the generated tokens.")

    @model_validator(mode="after")
    def _what_the_probabilities_are(self) -> "LlamaGenerationFields":
        if self.post_sampling_probs and self.n_probs:
            raise invalid("only log-probabilities before sampling can be returned", "post_sampling_probs")
        if self.n_predict is not None and self.max_tokens not in (None, self.n_predict):
            raise invalid("differs from n_predict; give one of the two", "max_tokens")
        return self

    def llama_request(self, prompts: tuple[AnyPrompt, ...], prompt_field: str) -> GenerationRequest:
        """The request in no API's form."""
        limit = self.max_tokens if self.n_predict is None else self.n_predict
        return self.generation_request(prompts, prompt_field, limit, self.n_probs or None)


class LlamaCompletionRequest(LlamaGenerationFields):
    """The body of ``POST /completion``. Control tokens in the text of a prompt are special."""

    prompt: Annotated[
        list[Annotated[str | list[int | str], BeforeValidator(_prompt)]],
        BeforeValidator(_prompts, json_schema_input_type=str | list[int | str] | list[str | list[int | str]]),
    ] = Field(max_length=MAX_CHOICES, description="Each is continued n times.")

    @model_validator(mode="after")
    def _not_too_many(self) -> "LlamaCompletionRequest":
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise invalid(f"the number of prompts times n must not exceed {MAX_CHOICES}", "n")
        return self

    def request(self) -> GenerationRequest:
        """The request in no API's form."""
        prompts = tuple(each if isinstance(each, str) else tuple(each) for each in self.prompt)
        return self.llama_request(prompts, "prompt")


class InfillFile(RequestBody):
    """Another file that helps to fill in the middle."""

    filename: str = Field(default="", description="Its name.")
    text: str = Field(description="Its content.")


class InfillRequest(LlamaGenerationFields):
    """The body of ``POST /infill``. The model must have control tokens for a text's prefix, suffix and middle."""

    input_prefix: str = Field(description="The text before the middle.")
    input_suffix: str = Field(description="The text after it.")
    input_extra: list[InfillFile] = Field(default=[], max_length=1024, description="Other files of the repository.")
    prompt: str = Field(default="", description="The beginning of the middle.")

    def request(self) -> GenerationRequest:
        """The request in no API's form."""
        files = tuple((each.filename, each.text) for each in self.input_extra)
        infill = Infill(
            prefix=self.input_prefix,
            suffix=self.input_suffix,
            beginning=self.prompt,
            files=files,
            suffix_param="input_suffix",
        )
        return self.llama_request((infill,), "input_prefix")


class TopProbability(Reply):
    """A token that was possible."""

    id: int
    token: str
    bytes: list[int]
    logprob: float | None


class TokenProbability(TopProbability):
    """A generated token."""

    top_logprobs: list[TopProbability]


class LlamaCompletion(Reply):
    """The reply of ``/completion``, and the last event of its stream; a list of these for several prompts."""

    index: int
    content: str
    """Empty at the end of a stream."""
    tokens: list[int]
    """Empty unless they were requested."""
    id_slot: int = _ANY_SLOT
    stop: Literal[True] = True
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    """Tokens of the prompt, cached ones included."""
    tokens_cached: int
    """Tokens in the cache at the end, of prompt and reply."""
    generation_settings: dict[str, Any]
    prompt: str | list[int | str]
    has_new_line: bool
    truncated: Literal[False] = False
    stop_type: Literal["eos", "limit", "word"]
    stopping_word: str
    timings: dict[str, int | float]
    completion_probabilities: list[TokenProbability] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )


def _probabilities(items: Sequence[TokenLogprobs]) -> list[TokenProbability]:
    found: list[TokenProbability] = []
    for item in items:
        chosen, *tops = (
            TopProbability(id=each.token, token=token_text(each), bytes=list(each.bytes), logprob=each.logprob)
            for each in (item.chosen, *item.top)
        )
        found.append(TokenProbability(**chosen.model_dump(), top_logprobs=tops))
    return found


@final
class LlamaDialect:
    """Replies of ``/completion`` and ``/infill``."""

    media_type = sse.MEDIA_TYPE

    def __init__(self, body: LlamaGenerationFields, prompts: Sequence[str | list[int | str]]) -> None:
        self._body = body
        self._prompts = prompts
        self._model = ""
        self._settings: dict[str, Any] = {}
        self._watch = Stopwatch()
        self._usages: dict[int, Usage] = {}
        self._new_lines: set[int] = set()

    def write(self, event: GenerationEvent) -> bytes:
        """The bytes of the next event in a stream."""
        match event:
            case Started():
                self._model, self._watch = event.model_id, Stopwatch()
                self._settings = _settings(self._body, event.sampling)
            case ChoiceStarted(choice):
                self._usages[choice] = Usage(prompt_tokens=event.prompt_tokens, completion_tokens=0)
            case ChoiceDelta():
                return self._delta(event)
            case ChoiceFinished(choice):
                self._usages[choice] = event.usage
                text = "".join(part.text for part in event.parts if isinstance(part, Content))
                rest = self._chunk(choice, text, (), ()) if text else b""
                ended = self._ended(choice, "", [], event.reason, event.stop, event.usage, None)
                return rest + sse.event(ended.model_dump_json().encode())
            case _:
                pass
        return b""

    def whole(self, choices: Sequence[ReplyChoice], usage: Usage) -> bytes:
        """The reply to a request that does not stream."""
        self._watch.first = min((choice.began for choice in choices if choice.began), default=0)
        replies: list[LlamaCompletion] = []
        for index, choice in enumerate(choices):
            if "\n" in choice.content:
                self._new_lines.add(index)
            tokens = choice.tokens if self._body.return_tokens else []
            replies.append(
                self._ended(
                    index, choice.content, tokens, choice.reason, choice.stop, choice.usage or usage, choice.logprobs
                )
            )
        told = [reply.model_dump(mode="json") for reply in replies]
        return to_json(told[0] if len(told) == 1 else told)

    def error(self, body: ErrorBody) -> bytes:
        """An error in the stream."""
        return sse.event(body.openai())

    def note(self, text: str) -> bytes:
        """A comment, which clients skip."""
        return sse.comment(text)

    def _delta(self, event: ChoiceDelta) -> bytes:
        self._watch.took(len(event.tokens))
        before = self._usages[event.choice]
        predicted = before.completion_tokens + len(event.tokens)
        self._usages[event.choice] = before.model_copy(update={"completion_tokens": predicted})
        text = "".join(part.text for part in event.parts if isinstance(part, Content))
        return self._chunk(event.choice, text, event.tokens, event.logprobs)

    def _chunk(self, choice: int, text: str, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> bytes:
        if "\n" in text:
            self._new_lines.add(choice)
        usage = self._usages[choice]
        chunk: dict[str, Any] = {
            "index": choice,
            "content": text,
            "tokens": tokens if self._body.return_tokens else [],
            "stop": False,
            "id_slot": _ANY_SLOT,
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
        }
        if self._body.n_probs:
            chunk["completion_probabilities"] = [each.model_dump(mode="json") for each in _probabilities(logprobs)]
        if self._body.timings_per_token:
            chunk["timings"] = self._watch.timings(usage)
        return sse.event(to_json(chunk))

    def _ended(
        self,
        choice: int,
        content: str,
        tokens: list[int],
        reason: Reason,
        stop: str | None,
        usage: Usage,
        logprobs: Sequence[TokenLogprobs] | None,
    ) -> LlamaCompletion:
        return LlamaCompletion(
            index=choice,
            content=content,
            tokens=tokens,
            model=self._model,
            tokens_predicted=usage.completion_tokens,
            tokens_evaluated=usage.prompt_tokens,
            tokens_cached=usage.prompt_tokens + max(0, usage.completion_tokens - 1),
            generation_settings=self._settings,
            prompt=self._prompts[choice // self._body.n],
            has_new_line=choice in self._new_lines,
            stop_type="word" if stop is not None else _STOP_TYPES[reason],
            stopping_word=stop or "",
            timings=self._watch.timings(usage),
            completion_probabilities=_probabilities(logprobs) if logprobs and self._body.n_probs else None,
        )


def _settings(body: LlamaGenerationFields, sampling: SamplingParams) -> dict[str, Any]:
    """The sampling parameters in force, by llama-server's names."""
    limit = body.max_tokens if body.n_predict is None else body.n_predict
    return {
        **sampling.model_dump(exclude={"repetition_penalty", "repetition_window", "logit_bias", "allowed"}),
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": sampling.repetition_window or -1,
        "logit_bias": [{"token": token, "bias": bias} for token, bias in sampling.logit_bias.items()],
        "n_predict": -1 if limit is None else limit,
        "max_tokens": -1 if limit is None else limit,
        "stop": body.stop,
        "ignore_eos": body.ignore_eos,
        "stream": body.stream,
        "n_probs": body.n_probs,
        "min_keep": 0,
        "timings_per_token": body.timings_per_token,
        "post_sampling_probs": False,
    }


def llama_completion_routes(services: Services) -> APIRouter:
    """Completions and filling in, as llama-server has them."""
    routes = APIRouter(tags=["llama-server"], route_class=DirectRoute)

    @routes.post("/completion", response_model=LlamaCompletion, openapi_extra=json_body(LlamaCompletionRequest))
    async def completion(request: Request) -> GenerationResponse:
        """Continues a prompt."""
        body = await read_body(request, LlamaCompletionRequest)
        return _answer(services, body, body.request(), body.prompt)

    @routes.post("/infill", response_model=LlamaCompletion, openapi_extra=json_body(InfillRequest))
    async def infill(request: Request) -> GenerationResponse:
        """Fills in the middle of a text."""
        body = await read_body(request, InfillRequest)
        return _answer(services, body, body.request(), [body.prompt])

    return routes


def _answer(
    services: Services,
    body: LlamaGenerationFields,
    request: GenerationRequest,
    prompts: Sequence[str | list[int | str]],
) -> GenerationResponse:
    generation = Generation(services, services.routing.resolve(body.model), request, f"cmpl-{uuid4().hex}")
    return GenerationResponse(generation, LlamaDialect(body, prompts), stream=body.stream)
