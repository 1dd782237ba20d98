"""The output format of a family of models: how replies mark reasoning and calls, and the grammar that forces a call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from exo.chat.grammar.builder import GrammarBuilder
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.json_call import closing_json_calls
from exo.chat.output.parser import OutputParser, ReplyState, Thinking, is_plain
from exo.chat.output.scanner import Scanner, Steps, markers
from exo.worker.protocol import commands

ReadCalls = Callable[[ReplyState, str], Steps[bool]]
"""Reads on after the marker that begins calls. Returns false if no call follows, or the last one is incomplete."""
WriteCalls = Callable[[GrammarBuilder, Sequence[Tool], bool], str]
"""Returns the expression of a call of one of the tools; if the flag is set, of one or more. May raise ValueError."""

_BRACE = "{"


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How a family of models writes reasoning and calls. ``name`` is its ``tool_format`` in model cards."""

    name: str
    special: bool = False
    """Whether markers may be control tokens, so that the runner must include control tokens in the text."""
    thinking: Thinking | None = None
    opening: tuple[str, ...] = ()
    """Markers one of which may precede content. They are dropped."""
    frame: tuple[str, ...] = ()
    """Other markers around content that are dropped, such as its end."""
    begin: tuple[str, ...] = ()
    """Markers that begin calls."""
    stray: tuple[str, ...] = ()
    """Markers that are dropped outside a call. Like ``begin``, they are text where no call is allowed."""
    read_calls: ReadCalls | None = None
    bare: bool = False
    """Whether a reply may begin with calls without a marker. They are read as after the marker ""."""
    closing_json: bool = False
    """Whether JSON calls without a marker may end a reply, on lines of their own after other text."""
    write_calls: WriteCalls | None = None
    read_reply: Callable[[ReplyState, bool], Steps[None]] | None = None
    """Reads a whole reply, in a format where content too has a marker. The flag: the reply begins in reasoning."""
    write_frame: Callable[[GrammarBuilder, bool, bool], str] | None = None
    """Returns the expression before content, or before calls if the last flag is set. The first flag as above."""
    known: bool = True
    """False if the call format is unknown. Calls are then read only where a grammar forces them."""

    def parser(self, *, tools: Sequence[Tool] | bool, in_reasoning: bool) -> OutputParser:
        """Returns a parser for one reply.

        ``tools`` are the tools that the model may call. Their schemas distinguish numbers from text in formats that
        write both alike; pass True if they are unknown. Without tools, markers of calls are text.
        """
        scanner = Scanner()
        read = self.read_reply or self._read
        return OutputParser(scanner, read(ReplyState(scanner, tools), in_reasoning))

    def starts_in_reasoning(self, prompt: str) -> bool:
        """Whether the rendered prompt ends inside reasoning, which the reply continues."""
        return self.thinking is not None and prompt.rstrip().endswith(self.thinking.begin.rstrip())

    def call_grammar(
        self, tools: Sequence[Tool], *, parallel: bool, special_tokens: Mapping[str, int], in_reasoning: bool = False
    ) -> str:
        """Returns a grammar in llguidance's Lark of a call of one of ``tools``, or with ``parallel`` of one or more.

        ``special_tokens`` maps the text of the vocabulary's control tokens to ids. If the reply begins in reasoning,
        the grammar lets the model end that first. Raises ``ValueError`` if the format has no calls, or cannot hold
        them to a tool's schema.
        """
        if self.write_calls is None:
            raise ValueError("this model's chat template has no tool calls")
        grammar = GrammarBuilder(special_tokens)
        calls = self.write_calls(grammar, tools, parallel)
        return grammar.source(f"{self._before(grammar, in_reasoning, calls=True)} {calls}")

    def after_reasoning(
        self, grammar: commands.Grammar, *, special_tokens: Mapping[str, int], in_reasoning: bool = True
    ) -> commands.Grammar:
        """Returns ``grammar``, which is for content, with the end of reasoning and the markers that precede content."""
        builder = GrammarBuilder(special_tokens)
        before = self._before(builder, in_reasoning, calls=False)
        if not before:
            return grammar
        source = builder.source(f"{before} {builder.embedded(grammar.syntax, grammar.source)}")
        return commands.Grammar(syntax="lark", source=source)

    def _before(self, grammar: GrammarBuilder, in_reasoning: bool, *, calls: bool) -> str:
        if self.write_frame is not None:
            return self.write_frame(grammar, in_reasoning, calls)
        pieces: list[str] = []
        if self.thinking is not None and in_reasoning:
            pieces += [grammar.text_until(self.thinking.end), r"/\n{0,2}/"]
        if self.opening and not calls:
            pieces.append(f"{grammar.one_of([*map(grammar.marked, self.opening)])}?")
        return grammar.sequence(*pieces) if pieces else ""

    def _read(self, reply: ReplyState, in_reasoning: bool) -> Steps[None]:
        thinking = self.thinking
        read_calls = self.read_calls if reply.calls_allowed else None
        begin = self.begin if read_calls is not None else ()
        if thinking is not None:
            yield from reply.before_answer(thinking, begin, inside=in_reasoning)
        dropped = (*self.opening, *self.frame, *(self.stray if begin else ()))
        thoughts = (thinking.begin,) if thinking and thinking.anywhere else ()
        closing = self.closing_json and reply.calls_allowed
        found = markers(*begin, *thoughts, *dropped, *((_BRACE,) if closing else ()))
        bare = partial(_attempt, reply, "", read_calls) if read_calls is not None and self.bare else None
        shown = False  # whether the last call was shown as content, so that its end must be shown too
        if bare is not None:
            yield from bare()
        while marker := (yield from reply.scanner.until(found, reply.prose.add)):
            if thinking is not None and marker == thinking.begin:
                reply.prose.marker()
                yield from reply.thought(thinking, begin)
                if bare is not None:
                    yield from bare()
            elif closing and marker == _BRACE:
                yield from _attempt_closing(reply)
            elif marker in self.stray and shown:
                yield reply.prose.add(marker)
            elif marker in self.stray:
                reply.prose.marker()
            elif marker in dropped:
                yield from _drop(reply, marker)
            elif read_calls is not None:
                shown = yield from _attempt(reply, marker, read_calls)
        yield reply.prose.finish()


def _drop(reply: ReplyState, marker: str) -> Steps[None]:
    """Drops a marker around content. A tag or phrase counts only at the beginning or the end of content."""
    if is_plain(marker) and reply.prose.begun:
        reply.scanner.hold(marker)
        yield from reply.scanner.space()
        inside = bool((yield from reply.scanner.peek()))
        text = reply.scanner.release()
        if inside:
            yield reply.prose.add(text)
            return
    reply.prose.marker()


def _attempt_closing(reply: ReplyState) -> Steps[None]:
    """Reads JSON calls from the brace just read, if it begins a line of content."""
    if reply.prose is not reply.content or not reply.prose.at_line:
        yield reply.prose.add(_BRACE)
        return
    reply.scanner.unread(_BRACE)
    reply.open()
    whole = yield from closing_json_calls(reply)
    yield from reply.end(whole=whole)


def _attempt(reply: ReplyState, marker: str, read: ReadCalls) -> Steps[bool]:
    """Reads calls. Returns whether the last one is invalid and was shown as content."""
    reply.open(marker)
    whole = yield from read(reply, marker)
    return (yield from reply.end(whole=whole))
