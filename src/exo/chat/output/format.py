"""How one family of models writes its replies: what is reasoning, what a call, and how to force a call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol, final

from exo.chat.grammar.builder import Grammar
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.events import Arguments, BrokenCall, Part, ToolCall
from exo.chat.output.parser import Reply, Thinking, is_plain
from exo.chat.output.scanner import MORE, Scanner, Steps, markers
from exo.worker.protocol import messages

CallReader = Callable[[Reply, str], Steps[bool]]
"""Reads on behind the marker that begins calls. False where no call comes, or none that is whole."""
CallWriter = Callable[[Grammar, Sequence[Tool], bool], str]
"""The expression of one call of one of these tools, or with True of several in a row. May raise ``ValueError``."""
ReplyReader = Callable[[Reply, bool], Steps[None]]
"""Reads a whole reply, which begins inside reasoning where the flag is true."""
FrameWriter = Callable[[Grammar, bool, bool], str]
"""The expression of what comes before content; with the last flag before a call. The first is for a reply that begins
inside reasoning. Empty where nothing has to come."""


_BRACE = "{"


class OutputParser(Protocol):
    """Reads one reply as its text arrives. The parts do not depend on how the text was cut into pieces."""

    def push(self, text: str) -> list[Part]:
        """The parts that ``text`` makes certain."""
        ...

    def finish(self, *, cut_off: bool = False) -> list[Part]:
        """The parts held back when the reply ends, wherever it ends. Never raises.

        ``cut_off`` where something other than the model ended the reply. Then an unfinished call is not completed, and
        its markup is not content.
        """
        ...


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How one family of models writes reasoning and calls."""

    name: str
    """What a card's ``tool_format`` calls it."""
    special: bool = False
    """Whether markers may be control tokens, so that the runner must write control tokens into its text."""
    thinking: Thinking | None = None
    opening: tuple[str, ...] = ()
    """Markers of which one may come before content."""
    frame: tuple[str, ...] = ()
    """Other markers that are no part of content, such as its end."""
    begin: tuple[str, ...] = ()
    """Markers that begin a call."""
    stray: tuple[str, ...] = ()
    """Markers that mean nothing outside a call. Where no call is allowed they are text, as ``begin`` is."""
    read_call: CallReader | None = None
    read_bare: CallReader | None = None
    """Reads calls at the very beginning of a reply, where the format has some without a marker."""
    closing_calls: Callable[[Reply], Steps[bool]] | None = None
    """Reads calls that begin with a brace on a line behind other text and end the reply, where the format has some."""
    write_calls: CallWriter | None = None
    read_reply: ReplyReader | None = None
    """For a format in which content, too, has its marker."""
    write_frame: FrameWriter | None = None
    """The same for writing."""
    known: bool = True
    """False where nothing tells how the model writes calls. They are then read only where a grammar forces them."""

    def parser(self, *, tools: Sequence[Tool] | bool, in_reasoning: bool) -> OutputParser:
        """A parser for one reply.

        ``tools`` are those that may be called; their schemas tell numbers from text in formats that write both alike
        (True: the schemas are unknown). Without any, markers of calls are ordinary text.
        """
        scanner = Scanner()
        reply = Reply(scanner, tools)
        read = self.read_reply or self._read
        return _Parser(scanner, read(reply, in_reasoning))

    def starts_in_reasoning(self, prompt: str) -> bool:
        """Whether the rendered prompt ends inside reasoning that the reply is to go on with."""
        return self.thinking is not None and prompt.rstrip().endswith(self.thinking.begin.rstrip())

    def call_grammar(
        self,
        tools: Sequence[Tool],
        *,
        parallel: bool,
        special_tokens: Mapping[str, int],
        in_reasoning: bool = False,
    ) -> str:
        """A grammar in llguidance's dialect of Lark: nothing but one call of one of ``tools``, or several in a row.

        ``special_tokens`` are the ids of the vocabulary's control tokens by text. Where the reply begins inside
        reasoning, the grammar lets the model end that first. Raises ``ValueError`` where the format has no calls, or
        none that could be held to a tool's schema.
        """
        if self.write_calls is None:
            raise ValueError("this model's chat template has no tool calls")
        grammar = Grammar(special_tokens)
        calls = self.write_calls(grammar, tools, parallel)
        return grammar.source(f"{self._frame(grammar, in_reasoning, calls=True)} {calls}")

    def after_reasoning(
        self, grammar: messages.Grammar, *, special_tokens: Mapping[str, int], in_reasoning: bool = True
    ) -> messages.Grammar:
        """The same grammar for a reply's content, where something has to come before content; else as it is."""
        writing = Grammar(special_tokens)
        frame = self._frame(writing, in_reasoning, calls=False)
        if not frame:
            return grammar
        source = writing.source(f"{frame} {writing.embedded(grammar.syntax, grammar.source)}")
        return messages.Grammar(syntax="lark", source=source)

    def _frame(self, grammar: Grammar, in_reasoning: bool, *, calls: bool) -> str:
        if self.write_frame is not None:
            return self.write_frame(grammar, in_reasoning, calls)
        pieces: list[str] = []
        if self.thinking is not None and in_reasoning:
            pieces += [grammar.text_until(self.thinking.end), r"/\n{0,2}/"]
        if self.opening and not calls:
            pieces.append(f"{grammar.one_of([*map(grammar.marked, self.opening)])}?")
        return grammar.sequence(*pieces) if pieces else ""

    def _read(self, reply: Reply, in_reasoning: bool) -> Steps[None]:
        thinking = self.thinking
        begin = self.begin if reply.calls_allowed and self.read_call is not None else ()
        if thinking is not None:
            yield from reply.before_answer(thinking, begin, inside=in_reasoning)
        dropped = (*self.opening, *self.frame, *(self.stray if begin else ()))
        thoughts = (thinking.begin,) if thinking and thinking.anywhere else ()
        closing = self.closing_calls if reply.calls_allowed else None
        found = markers(*begin, *thoughts, *dropped, *((_BRACE,) if closing else ()))
        bare = self.read_bare if reply.calls_allowed else None
        shown = False  # whether the last call could not be read, so that its end belongs to the text as well
        if bare is not None:
            yield from _attempt(reply, "", bare)
        while marker := (yield from reply.scanner.until(found, reply.prose.add)):
            if thinking is not None and marker == thinking.begin:
                reply.prose.marker()
                yield from reply.thought(thinking, begin)
                if bare is not None:
                    yield from _attempt(reply, "", bare)
            elif closing is not None and marker == _BRACE:
                yield from _attempt_closing(reply, closing)
            elif marker in self.stray and shown:
                yield reply.prose.add(marker)
            elif marker in self.stray:
                reply.prose.marker()
            elif marker in dropped:
                yield from _drop(reply, marker)
            elif self.read_call is not None:
                shown = yield from _attempt(reply, marker, self.read_call)
        yield reply.prose.finish()


def _drop(reply: Reply, marker: str) -> Steps[None]:
    """A marker around content is none of it. One that is plain text counts only where content begins or ends."""
    if is_plain(marker) and reply.prose.begun:
        reply.scanner.hold(marker)
        yield from reply.scanner.space()
        inside = bool((yield from reply.scanner.peek()))
        text = reply.scanner.release()
        if inside:
            yield reply.prose.add(text)
            return
    reply.prose.marker()


def _attempt_closing(reply: Reply, read: Callable[[Reply], Steps[bool]]) -> Steps[None]:
    """A call may begin with the brace that was read, if the brace begins a line of the content."""
    if reply.prose is not reply.content or not reply.prose.at_line:
        yield reply.prose.add(_BRACE)
        return
    reply.scanner.unread(_BRACE)
    reply.open()
    whole = yield from read(reply)
    yield from reply.end(whole=whole)


def _attempt(reply: Reply, marker: str, read: CallReader) -> Steps[bool]:
    """Reads calls. Returns whether the last one, or what looked like one, is content instead."""
    reply.open(marker)
    whole = yield from read(reply, marker)
    return (yield from reply.end(whole=whole))


@final
class _Parser:
    def __init__(self, scanner: Scanner, steps: Steps[None]) -> None:
        self._scanner = scanner
        self._steps = steps

    def push(self, text: str) -> list[Part]:
        self._scanner.feed(text)
        return self._advance()

    def finish(self, *, cut_off: bool = False) -> list[Part]:
        self._scanner.end(cut_off=cut_off)
        return self._advance()

    def _advance(self) -> list[Part]:
        parts: list[Part] = []
        for step in self._steps:
            if step is MORE:
                break
            if step is not None:
                parts.append(step)
        return _merged(parts)


def _merged(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind as one."""
    return [_joined(list(run)) for _, run in groupby(parts, _kind)]


def _kind(part: Part) -> tuple[type[Part], int]:
    return type(part), part.index if isinstance(part, ToolCall | Arguments | BrokenCall) else 0


def _joined(run: list[Part]) -> Part:
    first = run[0]
    if isinstance(first, ToolCall | BrokenCall):
        return first
    return replace(first, text="".join(part.text for part in run if not isinstance(part, ToolCall | BrokenCall)))
