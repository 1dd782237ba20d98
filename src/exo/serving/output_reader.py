"""Turns a runner's events into those of a choice: text becomes content, reasoning and tool calls."""

from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.chat.output.registry import OutputParser
from exo.serving.events import ChoiceDelta, ChoiceFinished, ChoicePrompt, Prefill
from exo.worker.protocol.messages import Delta, Finished, PrefillProgress, PromptLogprobs


class ChoiceReader:
    """Reads the events of one choice. Without a parser all text is content.

    If ``parallel`` is false, calls after the first are dropped. A stream cannot take a broken call back, and clients
    run the calls of a reply that finishes for them, so a choice with a broken call never has that finish reason.
    """

    def __init__(self, choice: int, parser: OutputParser | None, *, parallel: bool = True) -> None:
        self._choice = choice
        self._parser = parser
        self._parallel = parallel
        self._calls = 0
        self._broken = False
        self._unread = 0  # tokens whose text the parser holds back
        self._reasoning_tokens = 0

    def read(
        self, event: PrefillProgress | PromptLogprobs | Delta | Finished
    ) -> Prefill | ChoicePrompt | ChoiceDelta | ChoiceFinished:
        """The next event of the choice."""
        match event:
            case Delta():
                self._unread += len(event.tokens)
                parts = self._parts(event.text)
                self._count(parts)
                return ChoiceDelta(self._choice, parts, event.tokens, event.logprobs)
            case Finished():
                return self._finish(event)
            case PrefillProgress():
                return Prefill(self._choice, event.processed, event.total)
            case PromptLogprobs():
                return ChoicePrompt(self._choice, event.start, event.items)

    def _finish(self, event: Finished) -> ChoiceFinished:
        assert event.reason != "cancelled"
        parts = self._parts(event.text)
        if self._parser is not None:
            cut_off = event.reason == "length" or event.stop is not None
            parts += self._kept(self._parser.finish(cut_off=cut_off))
        called = self._calls and not self._broken and event.reason == "stop"
        self._count(parts)
        reason = "tool_calls" if called else event.reason
        return ChoiceFinished(self._choice, parts, reason, event.stop, event.usage, self._reasoning_tokens)

    def _count(self, parts: tuple[Part, ...]) -> None:
        """Counts reasoning tokens. Tokens whose text was held back belong to the first part that comes of it."""
        if parts:
            self._reasoning_tokens += self._unread if isinstance(parts[0], Reasoning) else 0
            self._unread = 0

    def _parts(self, text: str) -> tuple[Part, ...]:
        if not text:
            return ()
        return (Content(text),) if self._parser is None else self._kept(self._parser.push(text))

    def _kept(self, parts: list[Part]) -> tuple[Part, ...]:
        for part in parts:
            if isinstance(part, ToolCall):
                self._calls += 1
            elif isinstance(part, BrokenCall) and (self._parallel or part.index == 0):
                self._broken = True
        if not self._parallel and self._calls > 1:
            parts = [
                part for part in parts if not isinstance(part, ToolCall | Arguments | BrokenCall) or part.index == 0
            ]
        return tuple(parts)
