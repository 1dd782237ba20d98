"""Upstream's requests as commands of the runner, and the runner's events as upstream's chunks. Pure."""

from collections.abc import Iterator, Sequence
from typing import Any, final

from exo.api import types as api
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.chat.output.format import OutputFormat
from exo.chat.output.parser import OutputParser
from exo.shared.types.chunks import Chunk, ErrorChunk, PrefillProgressChunk, TokenChunk, ToolCallChunk
from exo.shared.types.common import ModelId
from exo.shared.types.memory import Memory
from exo.shared.types.text_generation import TextGenerationTaskParams
from exo.worker.protocol.commands import Generate, SamplingParams, Text
from exo.worker.protocol.events import Delta, Failed, Finished, Logprob, PrefillProgress, TokenLogprobs, Usage

# Upstream's MLX engine uses these where a request sets nothing.
MAX_TOKENS = 32168
DEFAULTS: dict[str, Any] = {"temperature": 0.7, "min_p": 0.05, "repetition_window": 20, "seed": 42}
RequestEvent = Delta | PrefillProgress | Finished | Failed


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


def generate(request: str, params: TextGenerationTaskParams, prompt: Sequence[Text], form: OutputFormat) -> Generate:
    """The command for a request. Raises ValueError for values that the runner does not accept."""
    given = DEFAULTS | params.model_dump(include=set(SamplingParams.model_fields), exclude_none=True)
    given |= {"top_k": max(0, given.get("top_k", 0)), "seed": given["seed"] % (1 << 64)}
    if params.repetition_context_size is not None:
        given["repetition_window"] = params.repetition_context_size
    stop = params.stop or ()
    return Generate(
        id=request,
        prompt=tuple(prompt),
        sampling=SamplingParams.model_validate(given),
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

    def __init__(self, model: ModelId, parser: OutputParser | None, model_bytes: int, began: float) -> None:
        """``began`` is the time of the request, in seconds."""
        self._model, self._parser, self._model_bytes = model, parser, model_bytes
        self._calls: dict[int, api.ToolCallItem] = {}
        self._scored: list[TokenLogprobs] = []
        self._last = self._reasoning = self._unread = 0
        self._began, self._first = began, 0.0

    def chunks(self, event: RequestEvent, now: float) -> Iterator[Chunk]:
        """The chunks of an event that has come at ``now``, in seconds. The last event has usage and speed."""
        match event:
            case PrefillProgress(processed=done, total=total):
                yield PrefillProgressChunk(model=self._model, processed_tokens=done, total_tokens=total)
            case Delta(tokens=tokens, text=text, logprobs=scored):
                self._first = self._first or now
                self._last = tokens[-1] if tokens else self._last
                self._unread += len(tokens)
                if self._parser is None and scored:
                    yield from (self._token(_text(each.chosen), each) for each in scored)
                    return
                self._scored += scored
                yield from self._parts(self._push(text))
            case Finished(text=text, reason=reason):
                rest = self._parser.finish(cut_off=reason == "length") if self._parser else []
                yield from self._parts([*self._push(text), *rest])
                yield self._end(event, now)
            case Failed(message=message):
                yield ErrorChunk(model=self._model, error_message=message)

    def _push(self, text: str) -> list[Part]:
        if self._parser is None:
            return [Content(text)] if text else []
        return self._parser.push(text) if text else []

    def _parts(self, parts: Sequence[Part]) -> Iterator[TokenChunk]:
        for part in parts:
            match part:
                case Content(text) | Reasoning(text):
                    thinking = isinstance(part, Reasoning)
                    self._reasoning += self._unread if thinking else 0
                    scored, self._scored, self._unread = self._scored, [], 0
                    yield self._token(text, scored[0] if len(scored) == 1 else None, thinking=thinking)
                case ToolCall(index, name):
                    self._calls[index] = api.ToolCallItem(name=name, arguments="")
                case Arguments(index, text):
                    self._calls[index].arguments += text
                case BrokenCall(index):
                    del self._calls[index]

    def _token(self, text: str, scored: TokenLogprobs | None, *, thinking: bool = False) -> TokenChunk:
        chunk = TokenChunk(model=self._model, text=text, token_id=self._last, usage=None, is_thinking=thinking)
        if scored is None:
            return chunk
        top = [api.TopLogprobItem(token=_text(t), logprob=t.logprob or 0.0, bytes=list(t.bytes)) for t in scored.top]
        chosen = scored.chosen.logprob or 0.0
        return chunk.model_copy(update={"token_id": scored.chosen.token, "logprob": chosen, "top_logprobs": top})

    def _end(self, ending: Finished, now: float) -> TokenChunk | ToolCallChunk:
        usage, stats = self._usage(ending.usage), self._stats(ending.usage, now)
        if self._calls and ending.reason == "stop":
            return ToolCallChunk(model=self._model, tool_calls=[*self._calls.values()], usage=usage, stats=stats)
        reason = "length" if ending.reason == "length" else "stop"
        last = TokenChunk(model=self._model, text="", token_id=self._last, usage=usage, finish_reason=reason)
        return last.model_copy(update={"stats": stats})

    def _usage(self, usage: Usage) -> api.Usage:
        return api.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=api.PromptTokensDetails(cached_tokens=usage.cached_tokens),
            completion_tokens_details=api.CompletionTokensDetails(reasoning_tokens=self._reasoning),
        )

    def _stats(self, usage: Usage, now: float) -> api.GenerationStats:
        first, computed = self._first or now, usage.prompt_tokens - usage.cached_tokens
        return api.GenerationStats(
            prompt_tps=computed / max(first - self._began, 1e-6),
            generation_tps=max(usage.completion_tokens - 1, 0) / max(now - first, 1e-6),
            prompt_tokens=usage.prompt_tokens,
            generation_tokens=usage.completion_tokens,
            peak_memory_usage=Memory.from_bytes(self._model_bytes),
            prefix_cache_hit="none" if not usage.cached_tokens else "partial" if computed > 1 else "exact",
        )


def _text(token: Logprob) -> str:
    return bytes(token.bytes).decode(errors="replace")
