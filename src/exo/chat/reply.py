"""What the parsers of all formats have in common: one reply, read part by part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from pydantic import JsonValue

from exo.chat.json_text import JsonObject
from exo.chat.parts import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.chat.scanner import Scanner, Steps, markers
from exo.chat.tools import Tool


@dataclass(frozen=True, slots=True)
class Thinking:
    """The markers around what a model thinks aloud."""

    begin: str
    end: str


@final
class Prose:
    """Text between markers, less the white space that is next to one. White space is held back until more follows."""

    def __init__(self, part: Callable[[str], Part], *, trim: bool) -> None:
        """With ``trim``, a marker came before."""
        self._part = part
        self._trim = trim
        self._space: list[str] = []
        self._before_marker: tuple[list[str], bool] = ([], trim)

    def add(self, text: str) -> Part | None:
        """More text."""
        body = text.rstrip()
        if not body:
            self._space.append(text)
            return None
        whole = "".join(self._space) + body
        self._space = [text[len(body) :]]
        trimmed = whole.lstrip() if self._trim else whole
        self._trim = False
        return self._part(trimmed)

    def marker(self) -> None:
        """A marker comes here."""
        self._before_marker = (self._space, self._trim)
        self._space = []
        self._trim = True

    def unmark(self) -> None:
        """The last marker was none, and nothing was added since."""
        self._space, self._trim = self._before_marker

    def paragraph(self) -> None:
        """What is added from here on is a paragraph of its own."""
        self._space = [] if self._trim else ["\n\n"]

    def finish(self) -> Part | None:
        """The reply ends here."""
        space = "".join(self._space)
        self._space.clear()
        return self._part(space) if space and not self._trim else None


@final
class Reply:
    """One reply being read: its text so far, and the calls in it."""

    def __init__(self, scanner: Scanner, tools: Sequence[Tool] | bool) -> None:
        """``tools`` as for ``OutputFormat.parser``."""
        self.scanner = scanner
        self.content = Prose(Content, trim=False)
        self.calls_allowed = bool(tools)
        self._schemas = {} if isinstance(tools, bool) else {tool.name: tool.parameters for tool in tools}
        self._calls = 0
        self._begun = False
        self._marked = False

    def schema(self, name: str) -> Mapping[str, JsonValue]:
        """The JSON Schema of a tool's arguments; empty where it is unknown."""
        return self._schemas.get(name, {})

    def open(self, marker: str = "") -> None:
        """A call may begin here, after ``marker``."""
        self._marked = bool(marker)
        self.next_call(marker)

    def call(self, name: str) -> ToolCall:
        """A call begins. Its text stays held until it is known to be whole."""
        self.content.marker()
        self._begun = True
        self._calls += 1
        return ToolCall(self._calls - 1, name)

    def arguments(self, text: str) -> Arguments | None:
        """More arguments of the last call."""
        return Arguments(self._calls - 1, text) if text else None

    def next_call(self, marker: str = "") -> None:
        """A call ends here and is whole. Another one may begin, after ``marker``."""
        self.scanner.hold(marker)
        self._begun = False

    def end(self, *, whole: bool) -> Steps[None]:
        """A call, or the attempt to read one, ends here. What is not ``whole`` is content, unless it was cut off."""
        text = self.scanner.release()
        if whole:
            return
        cut_off = self.scanner.at_end and self.scanner.cut_off
        if self._begun:
            yield BrokenCall(self._calls - 1, cut_off)
        if not text or (cut_off and (self._begun or self._marked or any(name in text for name in self._schemas))):
            return
        if self._begun:
            self.content.unmark()
        yield self.content.add(text)

    def several(self, begin: str, end: str, read: Callable[[], Steps[bool]]) -> Steps[bool]:
        """Reads calls that each come after ``begin``, the last one before ``end``; ``read`` reads one of them."""
        yield from self.scanner.space()
        if not (yield from self.scanner.either(begin)):
            return False
        while (yield from read()):
            self.next_call()
            yield from self.scanner.space()
            if (yield from self.scanner.either(begin, end)) != begin:
                return True  # a missing end is forgiven
        return False

    def json_arguments(self) -> Steps[bool]:
        """Reads a JSON object as the last call's arguments. False where it is none, or is cut off."""
        found = JsonObject()
        while not found.whole and not found.broken:
            if not (yield from self.scanner.peek()):
                return False
            self.scanner.advance(found.read)
            yield self.arguments(found.taken())
        return found.whole

    def thought(self, thinking: Thinking) -> Steps[None]:
        """Reads on behind the end of what the model thinks."""
        prose = Prose(Reasoning, trim=True)
        if not (yield from self.scanner.until(markers(thinking.end), prose.add)):
            yield prose.finish()
        self.content.marker()
