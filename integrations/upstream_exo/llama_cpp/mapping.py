"""Upstream's requests as commands of the runner, and the runner's events as upstream's chunks. Pure."""

from collections.abc import Iterator, Sequence
from typing import Any, final

from pydantic import JsonValue

from exo.api.types import (
    CompletionTokensDetails,
    GenerationStats,
    PromptTokensDetails,
    ToolCallItem,
    TopLogprobItem,
    Usage,
)
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.chat.output.format import OutputFormat
from exo.chat.output.parser import OutputParser
from exo.shared.types.chunks import TokenChunk, ToolCallChunk
from exo.shared.types.common import ModelId
from exo.shared.types.memory import Memory
from exo.shared.types.text_generation import TextGenerationTaskParams
from exo.worker.protocol import events
from exo.worker.protocol.commands import Generate, SamplingParams, Text
from exo.worker.protocol.events import Delta, Finished, Logprob, TokenLogprobs

# Upstream's MLX engine uses these where a request sets nothing.
MAX_TOKENS, SEED, WINDOW = 32168, 42, 20
SAMPLING: dict[str, float] = {"temperature": 0.7, "min_p": 0.05}
Variables = dict[str, JsonValue]
"""Variables of a chat template."""
_SAMPLING_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


def conversation(params: TextGenerationTaskParams) -> list[dict[str, Any]]:
    """The messages in OpenAI's form."""
    if params.chat_template_messages is not None:
        return [dict(message) for message in params.chat_template_messages]
    said = [{"role": message.role, "content": str(message.content)} for message in params.input if message.content]
    return [{"role": "system", "content": str(params.instructions)}, *said] if params.instructions else said


def tools(params: TextGenerationTaskParams) -> tuple[Tool, ...]:
    """The functions that the model may call."""
    functions = [tool.get("function", {}) for tool in params.tools or []]
    return tuple(Tool(f["name"], f.get("description", ""), f.get("parameters", {})) for f in functions if "name" in f)


def effort(params: TextGenerationTaskParams) -> str | None:
    """How much to reason: one of upstream's levels, "on", or None if the request leaves it to the model."""
    if params.reasoning_effort is not None or params.enable_thinking is None:
        return params.reasoning_effort
    return "on" if params.enable_thinking else "none"


def generate(request: str, params: TextGenerationTaskParams, prompt: Sequence[Text], form: OutputFormat) -> Generate:
    """The command for a request. Raises ValueError for values that the runner does not accept."""
    given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(params, name)) is not None}
    if given.get("top_k", 0) < 0:
        del given["top_k"]
    given["repetition_window"] = WINDOW if (window := params.repetition_context_size) is None else window
    seed = (SEED if params.seed is None else params.seed) % (1 << 64)
    stop = params.stop or ()
    return Generate(
        id=request,
        prompt=tuple(prompt),
        sampling=SamplingParams.model_validate({**SAMPLING, **given, "seed": seed}),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        max_tokens=MAX_TOKENS if params.max_output_tokens is None else params.max_output_tokens,
        ignore_eos=params.bench,
        cache_prompt=params.use_prefix_cache or not params.bench,
        logprobs=(params.top_logprobs or 0) if params.logprobs else None,
        show_special=form.special,
    )


@final
class Reply:
    """One request's events as chunks. Calls are handed over whole when the reply ends, as upstream's clients expect."""

    def __init__(self, model: ModelId, parser: OutputParser | None, began: float) -> None:
        self._model, self._parser = model, parser
        self._calls: dict[int, tuple[str, list[str]]] = {}
        self._scored: list[TokenLogprobs] = []
        self._last = self._reasoning = self._unread = 0
        self._began, self._first = began, None

    _first: float | None

    def delta(self, delta: Delta, now: float) -> Iterator[TokenChunk]:
        """The chunks of a piece of output that has come at ``now``, in seconds."""
        self._first = self._first or now
        self._last = delta.tokens[-1] if delta.tokens else self._last
        self._unread += len(delta.tokens)
        if delta.logprobs and self._parser is None:
            for each in delta.logprobs:
                yield self._token(_text(each.chosen), each)
            return
        self._scored += delta.logprobs
        yield from self._chunks(self._push(delta.text))

    def finished(self, ending: Finished, now: float, model_bytes: int) -> Iterator[TokenChunk | ToolCallChunk]:
        """The last chunks, with usage and speed."""
        rest = self._parser.finish(cut_off=ending.reason == "length") if self._parser else []
        yield from self._chunks([*self._push(ending.text), *rest])
        usage, stats = self._usage(ending.usage), self._stats(ending.usage, now, model_bytes)
        if self._calls and ending.reason == "stop":
            items = [ToolCallItem(name=name, arguments="".join(text)) for name, text in self._calls.values()]
            yield ToolCallChunk(model=self._model, tool_calls=items, usage=usage, stats=stats)
            return
        reason = "length" if ending.reason == "length" else "stop"
        last = TokenChunk(model=self._model, text="", token_id=self._last, usage=usage)
        yield last.model_copy(update={"finish_reason": reason, "stats": stats})

    def _push(self, text: str) -> list[Part]:
        if self._parser is None:
            return [Content(text)] if text else []
        return self._parser.push(text) if text else []

    def _chunks(self, parts: Sequence[Part]) -> Iterator[TokenChunk]:
        for part in parts:
            match part:
                case Content(text) | Reasoning(text):
                    thinking = isinstance(part, Reasoning)
                    self._reasoning += self._unread if thinking else 0
                    scored, self._scored, self._unread = self._scored, [], 0
                    yield self._token(text, scored[0] if len(scored) == 1 else None, thinking=thinking)
                case ToolCall(index, name):
                    self._calls[index] = name, []
                case Arguments(index, text):
                    self._calls[index][1].append(text)
                case BrokenCall(index):
                    del self._calls[index]

    def _token(self, text: str, scored: TokenLogprobs | None, *, thinking: bool = False) -> TokenChunk:
        chunk = TokenChunk(model=self._model, text=text, token_id=self._last, usage=None, is_thinking=thinking)
        if scored is None:
            return chunk
        top = [TopLogprobItem(token=_text(t), logprob=t.logprob or 0.0, bytes=list(t.bytes)) for t in scored.top]
        chosen = scored.chosen
        return chunk.model_copy(
            update={"token_id": chosen.token, "logprob": chosen.logprob or 0.0, "top_logprobs": top}
        )

    def _usage(self, usage: events.Usage) -> Usage:
        return Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=self._reasoning),
        )

    def _stats(self, usage: events.Usage, now: float, model_bytes: int) -> GenerationStats:
        first, computed = self._first or now, usage.prompt_tokens - usage.cached_tokens
        return GenerationStats(
            prompt_tps=computed / max(first - self._began, 1e-6),
            generation_tps=max(usage.completion_tokens - 1, 0) / max(now - first, 1e-6),
            prompt_tokens=usage.prompt_tokens,
            generation_tokens=usage.completion_tokens,
            peak_memory_usage=Memory.from_bytes(model_bytes),
            prefix_cache_hit="none" if not usage.cached_tokens else "partial" if computed > 1 else "exact",
        )


def _text(token: Logprob) -> str:
    return bytes(token.bytes).decode(errors="replace")
