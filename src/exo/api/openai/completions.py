"""OpenAI's text completions: the reply, in one piece and in chunks."""

import codecs
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, final

from pydantic import Field
from pydantic_core import to_json

from exo.api.http.reply import ReplyChoice
from exo.api.openai.response import ChunkWriter, CompletionUsage, Reply, absent, token_text
from exo.chat.output.events import Content, Part
from exo.serving.events import (
    ChoiceDelta,
    ChoiceFinished,
    ChoicePrompt,
    ChoiceStarted,
    Completed,
    GenerationEvent,
    Started,
)
from exo.worker.protocol.events import Logprob, TokenLogprobs, Usage


class CompletionLogprobs(Reply):
    """Four lists of equal length, an entry for each token. ``top_logprobs`` includes the token itself, unless empty.

    ``text_offset`` is where the token begins in the choice's text, in characters. A control token takes none there.
    """

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
    timings: dict[str, int | float] | None = Field(default=None, exclude_if=absent)


@final
class _Offsets:
    """Finds where the tokens of one choice begin in its text. They must be passed in order."""

    def __init__(self, echo: str, control: Collection[int]) -> None:
        self._echo = echo
        self._control = control
        self._end = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._in_prompt = True

    def prompt(self, items: Iterable[TokenLogprobs]) -> list[int]:
        return [self._prompt(each.chosen) for each in items]

    def output(self, items: Iterable[TokenLogprobs]) -> list[int]:
        if self._in_prompt:
            self._in_prompt = False
            self._decoder.reset()
            self._end = len(self._echo)
        return [self._output(each.chosen) for each in items]

    def _prompt(self, token: Logprob) -> int:
        """BOS, and a leading space that some tokenizers add, are in the text only if the client wrote them."""
        begin = self._end
        spelt = bytes(token.bytes)
        text = spelt.decode(errors="replace") if token.token in self._control else self._decoder.decode(spelt)
        for shown in (text, text.lstrip(" ")):
            if self._echo.startswith(shown, begin):
                self._end += len(shown)
                return begin
        if token.token not in self._control:  # the tokenizer has normalised the text
            self._end = min(begin + len(text), len(self._echo))
        return begin

    def _output(self, token: Logprob) -> int:
        begin = self._end
        if token.token not in self._control:
            self._end += len(self._decoder.decode(bytes(token.bytes)))
        return begin


def _logprobs(items: Iterable[TokenLogprobs], offsets: list[int]) -> CompletionLogprobs:
    """The form of the API."""
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for item in items:
        tokens.append(token_text(item.chosen))
        values.append(item.chosen.logprob)
        found = [*item.top, item.chosen] if item.top else []
        top = {token_text(each): each.logprob for each in found if each.logprob is not None}
        tops.append(None if item.chosen.logprob is None else top)
    return CompletionLogprobs(tokens=tokens, token_logprobs=values, top_logprobs=tops, text_offset=offsets)


def _text(parts: Iterable[Part]) -> str:
    return "".join([part.text for part in parts if isinstance(part, Content)])


@final
class CompletionDialect(ChunkWriter):
    """``/v1/completions``. ``n`` is the number of choices of each prompt."""

    kind = "text_completion"

    def __init__(self, reply_id: str, *, n: int = 1, **options: bool) -> None:
        """``options`` are those of ``ChunkWriter``."""
        super().__init__(reply_id, **options)
        self._n = n
        self._echoes: tuple[str, ...] = ()
        self._control: frozenset[int] = frozenset()
        self._offsets: dict[int, _Offsets] = {}

    def whole(self, choices: Sequence[ReplyChoice], usage: Usage) -> bytes:
        return (
            Completion(
                id=self.id,
                created=self.created,
                model=self.model,
                system_fingerprint=self.fingerprint,
                choices=[self._choice(index, choice) for index, choice in enumerate(choices)],
                usage=CompletionUsage.of(usage),
                timings=self.timings(choices, usage),
            )
            .model_dump_json()
            .encode()
        )

    def write(self, event: GenerationEvent) -> bytes:
        if isinstance(event, ChoiceStarted | ChoiceDelta | ChoiceFinished):
            self.meter(event)
        match event:
            case ChoiceDelta(choice):
                text = _text(event.parts)
                logprobs: CompletionLogprobs | None = None
                if self._logprobs and event.logprobs:
                    logprobs = _logprobs(event.logprobs, self._offsets_of(choice).output(event.logprobs))
                extra = self._extra(logprobs, event.tokens)
                return self._chunk(choice, text, extra) if text or extra else b""
            case ChoiceFinished(choice):
                text = _text(event.parts)
                end = b'{"index":%d,"text":"","finish_reason":"%b"' % (choice, event.reason.encode())
                return (self._chunk(choice, text, b"") if text else b"") + self.chunk(end)
            case ChoiceStarted(choice):
                # With log-probabilities, the prompt's text comes with those of its tokens.
                return b"" if self._logprobs or not self._echo(choice) else self._chunk(choice, self._echo(choice), b"")
            case ChoicePrompt(choice):
                text = "" if event.start else self._echo(choice)
                logprobs = _logprobs(event.logprobs, self._offsets_of(choice).prompt(event.logprobs))
                return self._chunk(choice, text, self._extra(logprobs, ()))
            case Started():
                self.start(event)
                self._echoes = event.prompts
                self._control = frozenset(event.capabilities.special_ids)
                return b""
            case Completed(usage):
                return self.end(usage)
            case _:
                return b""

    def _echo(self, choice: int) -> str:
        return self._echoes[choice // self._n] if self._echoes else ""

    def _chunk(self, choice: int, text: str, extra: bytes) -> bytes:
        return self.chunk(b'{"index":%d,"text":%b%b,"finish_reason":null' % (choice, to_json(text), extra))

    def _offsets_of(self, choice: int) -> _Offsets:
        if choice not in self._offsets:
            self._offsets[choice] = _Offsets(self._echo(choice), self._control)
        return self._offsets[choice]

    def _extra(self, logprobs: CompletionLogprobs | None, tokens: Sequence[int]) -> bytes:
        extra = b""
        if self._logprobs and logprobs is not None:
            extra += b',"logprobs":' + logprobs.model_dump_json().encode()
        if self._token_ids and tokens:
            extra += b',"token_ids":' + to_json(tokens)
        return extra

    def _choice(self, index: int, choice: ReplyChoice) -> TextChoice:
        assert choice.reason != "tool_calls"
        offsets = self._offsets_of(index)
        begins = offsets.prompt(choice.prompt_logprobs) + offsets.output(choice.logprobs)
        logprobs = _logprobs([*choice.prompt_logprobs, *choice.logprobs], begins)
        return TextChoice(
            index=index,
            text=self._echo(index) + choice.content,
            logprobs=logprobs if self._logprobs else None,
            finish_reason=choice.reason,
            token_ids=choice.tokens if self._token_ids else None,
        )
