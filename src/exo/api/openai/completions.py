"""OpenAI's text completions: the reply, whole and in chunks."""

from collections.abc import Iterable, Sequence
from typing import Literal, final

from pydantic import Field
from pydantic_core import to_json

from exo.api.http.response import ReplyChoice
from exo.api.openai.chunks import ChunkWriter, CompletionUsage, Reply, absent, token_text
from exo.chat.output.events import Content, Part
from exo.serving.generation import Serving
from exo.serving.output_reader import Ended, Said
from exo.worker.protocol.messages import PromptLogprobs, TokenLogprobs, Usage


class CompletionLogprobs(Reply):
    """Four lists of equal length, an entry for each token. ``text_offset`` counts characters of ``text``."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Reply):
    """One of ``n`` continuations of one of the prompts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = Field(default=None, exclude_if=absent)
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = Field(default=None, exclude_if=absent)


class Completion(Reply):
    """The reply of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: CompletionUsage


def _logprobs(items: Iterable[TokenLogprobs], offset: int) -> tuple[CompletionLogprobs, int]:
    """The wire's form, and the offset after the last token."""
    tokens: list[str] = []
    offsets: list[int] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for item in items:
        offsets.append(offset)
        offset += len(bytes(item.chosen.bytes).decode(errors="ignore"))
        tokens.append(token_text(item.chosen))
        values.append(item.chosen.logprob)
        top = {token_text(each): each.logprob for each in item.top if each.logprob is not None}
        tops.append(None if item.chosen.logprob is None else top)
    logprobs = CompletionLogprobs(tokens=tokens, token_logprobs=values, top_logprobs=tops, text_offset=offsets)
    return logprobs, offset


def _text(parts: Iterable[Part]) -> str:
    return "".join([part.text for part in parts if isinstance(part, Content)])


@final
class CompletionDialect(ChunkWriter):
    """``/v1/completions``. ``n`` is how many choices each prompt has."""

    def __init__(
        self,
        reply_id: str,
        *,
        n: int = 1,
        include_usage: bool = False,
        logprobs: bool = False,
        token_ids: bool = False,
    ) -> None:
        super().__init__(reply_id, "text_completion", include_usage=include_usage)
        self._n = n
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._echoes: tuple[str, ...] = ()
        self._offsets: dict[int, int] = {}

    def serving(self, serving: Serving) -> None:
        self.start(serving)
        self._echoes = serving.prompts

    def whole(self, choices: Sequence[ReplyChoice], usage: Usage) -> bytes:
        return (
            Completion(
                id=self.id,
                created=self.created,
                model=self.model,
                system_fingerprint=self.fingerprint,
                choices=[self._choice(index, choice) for index, choice in enumerate(choices)],
                usage=CompletionUsage.of(usage),
            )
            .model_dump_json()
            .encode()
        )

    def opening(self, choice: int, prompt_tokens: int = 0) -> bytes:
        """A text completion has no role; what it may have is the prompt."""
        echo = self._echo(choice)
        # With log-probabilities, those of the prompt come when it is computed, and its text with them.
        return self._chunk(choice, echo, b"") if echo and not self._logprobs else b""

    def more(self, choice: int, event: PromptLogprobs | Said | Ended) -> bytes:
        if isinstance(event, PromptLogprobs):
            text = "" if event.start else self._echo(choice)
            return self._chunk(choice, text, self._extra(choice, event.items, ()))
        text = _text(event.parts)
        if isinstance(event, Ended):
            rest = self._chunk(choice, text, b"") if text else b""
            end = b'{"index":%d,"text":"","finish_reason":"%b"' % (choice, event.reason.encode())
            return rest + self.chunk(end)
        extra = self._extra(choice, event.logprobs, event.tokens)
        return self._chunk(choice, text, extra) if text or extra else b""

    def _echo(self, choice: int) -> str:
        return self._echoes[choice // self._n] if self._echoes else ""

    def _chunk(self, choice: int, text: str, extra: bytes) -> bytes:
        return self.chunk(b'{"index":%d,"text":%b%b,"finish_reason":null' % (choice, to_json(text), extra))

    def _extra(self, choice: int, items: Sequence[TokenLogprobs], tokens: Sequence[int]) -> bytes:
        extra = b""
        if self._logprobs and items:
            logprobs, self._offsets[choice] = _logprobs(items, self._offsets.get(choice, 0))
            extra += b',"logprobs":' + logprobs.model_dump_json().encode()
        if self._token_ids and tokens:
            extra += b',"token_ids":' + to_json(tokens)
        return extra

    def _choice(self, index: int, choice: ReplyChoice) -> TextChoice:
        assert choice.reason != "tool_calls"
        logprobs, _ = _logprobs([*choice.prompt_logprobs, *choice.logprobs], 0)
        return TextChoice(
            index=index,
            text=self._echo(index) + choice.content,
            logprobs=logprobs if self._logprobs else None,
            finish_reason=choice.reason,
            token_ids=choice.tokens if self._token_ids else None,
        )
