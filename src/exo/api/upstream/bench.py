"""``/bench/chat/completions``: chat completions that are measured as upstream's benchmark expects."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

from pydantic import Field
from pydantic_core import to_json

from exo.api.http import sse
from exo.api.http.errors import ErrorBody
from exo.api.http.reply import ReplyChoice
from exo.api.openai.chat_request import ChatCompletionRequest
from exo.api.openai.response import ChatDialect
from exo.api.openai.timings import Stopwatch
from exo.serving.events import ChoiceDelta, Completed, GenerationEvent, Started
from exo.serving.request import GenerationRequest
from exo.worker.protocol.events import Usage


class BenchChatRequest(ChatCompletionRequest):
    """A chat completion whose output has ``max_tokens`` tokens, and whose prompt is computed."""

    use_prefix_cache: bool = Field(default=False, description="Take what is cached of the prompt from the cache.")

    def request(self) -> GenerationRequest:
        """The request in no API's form."""
        return replace(super().request(), ignore_eos=True)


@final
class BenchDialect:
    """The replies of chat completions with the speed of the prompt and of the output."""

    media_type = ChatDialect.media_type

    def __init__(self, reply_id: str, used_memory: Callable[[], int]) -> None:
        """``used_memory`` returns the bytes that the model's runners use."""
        self._chat = ChatDialect(reply_id)
        self._used_memory = used_memory
        self._watch = Stopwatch()

    def write(self, event: GenerationEvent) -> bytes:
        """See ``Dialect``. A stream has the speed in a comment before its end."""
        match event:
            case Started():
                self._watch = Stopwatch()
            case ChoiceDelta(tokens=tokens):
                self._watch.took(len(tokens))
            case Completed(usage):
                stats = sse.comment(f"generation_stats {self._stats(usage).decode()}")
                return stats + self._chat.write(event)
            case _:
                pass
        return self._chat.write(event)

    def whole(self, choices: Sequence[ReplyChoice], usage: Usage) -> bytes:
        """See ``Dialect``."""
        self._watch.first = min((choice.began for choice in choices if choice.began), default=0)
        body = self._chat.whole(choices, usage)
        return body[:-1] + b',"generation_stats":%b,"power_usage":null}' % self._stats(usage)

    def error(self, body: ErrorBody) -> bytes:
        """See ``Dialect``."""
        return self._chat.error(body)

    def note(self, text: str) -> bytes:
        """See ``Dialect``."""
        return self._chat.note(text)

    def _stats(self, usage: Usage) -> bytes:
        """The first token belongs to the prompt's time."""
        timings = self._watch.timings(usage)
        seconds, computed = timings["predicted_ms"] / 1000, timings["prompt_n"]
        stats = {
            "prompt_tps": timings["prompt_per_second"],
            "generation_tps": round((usage.completion_tokens - 1) / seconds, 3) if seconds else 0.0,
            "prompt_tokens": usage.prompt_tokens,
            "generation_tokens": usage.completion_tokens,
            "peak_memory_usage": {"inBytes": self._used_memory()},
            "prefix_cache_hit": "none" if not usage.cached_tokens else "partial" if computed > 1 else "exact",
        }
        return to_json(stats)
