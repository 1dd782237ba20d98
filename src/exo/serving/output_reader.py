"""A sequence's events as its client is to understand them: content, reasoning and calls instead of text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.chat.output.registry import OutputParser
from exo.worker.protocol.messages import Delta, Finished, PrefillProgress, PromptLogprobs, TokenLogprobs, Usage

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Said:
    """More of a reply. ``tokens`` and their ``logprobs``, if asked for, may run ahead of the parts."""

    parts: tuple[Part, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a reply, with its last parts. ``stop`` is the stop string that ended it."""

    parts: tuple[Part, ...]
    reason: Reason
    stop: str | None
    usage: Usage
    reasoning_tokens: int = 0
    """Of the completion's."""


ChoiceEvent = PrefillProgress | PromptLogprobs | Said | Ended


class Reader:
    """Reads one sequence. Without a parser all text is content.

    With ``parallel`` false, calls after the first are left out. A reply with a broken call does not end for its calls:
    a stream cannot take back what it told of that one, and a client runs what it is told to.
    """

    def __init__(self, parser: OutputParser | None, *, parallel: bool = True) -> None:
        self._parser = parser
        self._parallel = parallel
        self._calls = 0
        self._broken = False
        self._unread = 0
        self._reasoning_tokens = 0

    def read(self, event: PrefillProgress | PromptLogprobs | Delta | Finished) -> ChoiceEvent:
        """The same event, read."""
        match event:
            case Delta():
                self._unread += len(event.tokens)
                parts = self._parts(event.text)
                self._count(parts)
                return Said(parts, event.tokens, event.logprobs)
            case Finished():
                assert event.reason != "cancelled"
                parts = self._parts(event.text)
                if self._parser is not None:
                    cut_off = event.reason == "length" or event.stop is not None
                    parts += self._kept(self._parser.finish(cut_off=cut_off))
                called = self._calls and not self._broken and event.reason == "stop"
                reason = "tool_calls" if called else event.reason
                self._count(parts)
                return Ended(parts, reason, event.stop, event.usage, self._reasoning_tokens)
            case _:
                return event

    def _count(self, parts: tuple[Part, ...]) -> None:
        """Tokens whose text is held back belong to what comes out of it first."""
        if parts:
            self._reasoning_tokens += self._unread if isinstance(parts[0], Reasoning) else 0
            self._unread = 0

    def _parts(self, text: str) -> tuple[Part, ...]:
        if not text:
            return ()
        return (Content(text),) if self._parser is None else self._kept(self._parser.push(text))

    def _kept(self, parts: list[Part]) -> tuple[Part, ...]:
        self._calls += sum(isinstance(part, ToolCall) for part in parts)
        if not self._parallel and self._calls > 1:
            parts = [
                part for part in parts if not isinstance(part, ToolCall | Arguments | BrokenCall) or part.index == 0
            ]
        self._broken = self._broken or any(isinstance(part, BrokenCall) for part in parts)
        return tuple(parts)


def total_usage(usages: Mapping[int, Usage], n: int) -> Usage:
    """Usage of a whole request from that of its choices: each prompt counts once, however many choices it has."""
    prompts = [usage for choice, usage in usages.items() if choice % n == 0]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
        completion_tokens=sum(usage.completion_tokens for usage in usages.values()),
        cached_tokens=sum(usage.cached_tokens for usage in prompts),
    )
