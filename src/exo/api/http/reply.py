"""The finished choices of a reply in any dialect, with their calls."""

import time
from dataclasses import dataclass, field

from exo.chat.output.events import Arguments, BrokenCall, Content, Reasoning, ToolCall
from exo.serving.events import ChoiceDelta, ChoiceFinished, ChoicePrompt, Reason
from exo.worker.protocol.events import TokenLogprobs, Usage


@dataclass(slots=True)
class Call:
    """A tool call. ``arguments`` is a JSON object, or the beginning of one if the call is not ``whole``."""

    name: str
    arguments: str = ""
    whole: bool = True


@dataclass(slots=True)
class ReplyChoice:
    """One finished choice. Fields that were not requested stay empty."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list[Call])
    reason: Reason = "stop"
    stop: str | None = None
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    began: int = 0
    """The time of the first token, by ``time.monotonic_ns``; 0 if there is none."""
    reasoning_tokens: int = 0
    usage: Usage | None = None
    """Set at the end."""

    def add(self, event: ChoicePrompt | ChoiceDelta | ChoiceFinished) -> None:
        """Takes the next event of the choice."""
        if isinstance(event, ChoicePrompt):
            self.prompt_logprobs += event.logprobs
            return
        for part in event.parts:
            match part:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case ToolCall(_, name):
                    self.calls.append(Call(name))
                case Arguments(index, text):
                    self.calls[index].arguments += text
                case BrokenCall(index, _):
                    self.calls[index].whole = False
        if isinstance(event, ChoiceDelta):
            self.began = self.began or time.monotonic_ns()
            self.tokens += event.tokens
            self.logprobs += event.logprobs
        else:
            self.reason, self.stop = event.reason, event.stop
            self.reasoning_tokens, self.usage = event.reasoning_tokens, event.usage
            self._withdraw()

    def _withdraw(self) -> None:
        """Removes broken calls, whose text is content. A call that the token limit cut off stays."""
        if self.reason == "length" or all(call.whole for call in self.calls):
            return
        self.calls = [call for call in self.calls if call.whole]
        if self.calls:
            self.reason = "tool_calls"
