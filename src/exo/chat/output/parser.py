"""What the parsers of all formats have in common: one reply, read part by part."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from pydantic import JsonValue

from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.chat.output.json_scanner import JsonObject
from exo.chat.output.scanner import Scanner, Steps, markers


@dataclass(frozen=True, slots=True)
class Thinking:
    """The markers around what a model thinks aloud."""

    begin: str
    end: str

    @property
    def anywhere(self) -> bool:
        """Whether ``begin`` counts wherever it comes."""
        return not is_plain(self.begin)


_MARKUP = ("", "<", "`", "[")
"""What may follow arguments whose closing brackets are missing: the end, or the beginning of a format's marker."""
_PLAIN = re.compile(r"</?[\w:]+>|[\w ]+:")
_FENCE = re.compile(r" *(```|~~~)")
_LINE_BEGINNING = 40
"""Characters that tell what kind of line it is."""


def is_plain(marker: str) -> bool:
    """Whether the marker is a tag or a phrase, which an answer may have in its text."""
    return _PLAIN.fullmatch(marker) is not None


@final
class Prose:
    """Text between markers, less the white space that is next to one. White space is held back until more follows."""

    def __init__(self, part: Callable[[str], Part], *, trim: bool) -> None:
        """With ``trim``, a marker came before."""
        self.begun = False
        """Whether there is text already."""
        self._part = part
        self._trim = trim
        self._space: list[str] = []
        self._before_marker: tuple[list[str], bool] = ([], trim)
        self._line = ""
        """The beginning of the last line."""
        self._fence = ""
        """What ends the code block that the text is in."""

    @property
    def at_line(self) -> bool:
        """Whether a line begins here that is not in a fenced code block."""
        return not self._fence and not self._line.strip()

    def add(self, text: str) -> Part | None:
        """More text."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if (match := _FENCE.match(line)) and self._fence in ("", match[1]):
                self._fence = "" if self._fence else match[1]
        self._line = self._line[:_LINE_BEGINNING]
        body = text.rstrip()
        if not body:
            self._space.append(text)
            return None
        self.begun = True
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
        self.prose = self.content
        """Where text goes that is no call: the content, or reasoning that the model never ends."""
        self.calls_allowed = bool(tools)
        self._schemas = {} if isinstance(tools, bool) else {tool.name: tool.parameters for tool in tools}
        self._calls = 0
        self._begun = False
        self._marked = False
        self._before = 0
        """Calls before the last attempt to read some."""

    def schema(self, name: str) -> Mapping[str, JsonValue]:
        """The JSON Schema of a tool's arguments; empty where it is unknown."""
        return self._schemas.get(name, {})

    def knows(self, name: str) -> bool:
        """Whether a tool may be called so."""
        return name in self._schemas or not self._schemas

    def offers(self, name: str) -> bool:
        """Whether the request has a tool of this name."""
        return name in self._schemas

    def suits(self, name: str, arguments: str) -> bool:
        """Whether the tool's schema knows these arguments, a JSON object, and misses none. Values are not examined."""
        schema = self.schema(name)
        given: Mapping[str, JsonValue] = json.loads(arguments)
        required, properties = schema.get("required"), schema.get("properties")
        if isinstance(required, list) and not all(each in given for each in required):
            return False
        return (
            not isinstance(properties, dict)
            or bool(schema.get("additionalProperties"))
            or given.keys() <= properties.keys()
        )

    def open(self, marker: str = "") -> None:
        """A call may begin here, after ``marker``."""
        self._marked = bool(marker)
        self._before = self._calls
        self.next_call(marker)

    def call(self, name: str) -> ToolCall:
        """A call begins. Its text stays held until it is known to be whole."""
        self.prose.marker()
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

    def end(self, *, whole: bool) -> Steps[bool]:
        """A call, or the attempt to read one, ends here. What is not ``whole`` is content, unless it was cut off.

        Returns whether a call, or all that the attempt has read, is content.
        """
        text = self.scanner.release()
        if whole:
            return False
        cut_off = self.scanner.at_end and self.scanner.cut_off
        if self._begun:
            yield BrokenCall(self._calls - 1, cut_off)
        if not text or (cut_off and (self._begun or self._marked or any(name in text for name in self._schemas))):
            return False
        if self._begun:
            self.prose.unmark()
        yield self.prose.add(text)
        return self._begun or self._calls == self._before

    def several(self, begin: str, end: str, read: Callable[[], Steps[bool]], *, begun: bool = False) -> Steps[bool]:
        """Reads calls that each come after ``begin``, the last one before ``end``; ``read`` reads one of them.

        With ``begun``, the first ``begin`` has been read.
        """
        yield from self.scanner.space()
        if not begun and not (yield from self.scanner.either(begin)):
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
        while not found.whole and not found.broken and (yield from self.scanner.peek()):
            self.scanner.advance(found.read)
            yield self.arguments(found.taken())
        if not found.whole and (yield from self.scanner.peek()) in _MARKUP:
            if not (self.scanner.at_end and self.scanner.cut_off):
                found.complete()
            yield self.arguments(found.taken())
        return found.whole

    def before_answer(self, thinking: Thinking, begin: tuple[str, ...], *, inside: bool) -> Steps[None]:
        """Reads reasoning up to the answer; the reply begins ``inside`` it or before it. ``begin`` are calls' markers.

        An end of reasoning that was not begun, which the prompt has ended already, means nothing.
        """
        scanner = self.scanner
        while self.prose is self.content:
            marker = thinking.begin
            if not inside:
                scanner.hold()
                yield from scanner.space()
                marker = yield from scanner.either(thinking.begin, thinking.end)
                if not marker:
                    scanner.unread(scanner.release())
                    return
                scanner.release()
                self.content.marker()
            if marker == thinking.begin:
                yield from self.thought(thinking, begin)
            inside = False

    def thought(self, thinking: Thinking, begin: tuple[str, ...]) -> Steps[None]:
        """Reads on behind the end of what the model thinks, which it may begin once more.

        A draft of a call is part of it. If the model never ends its reasoning, what looks like a draft may be a call:
        it is still to be read, and what is none of it is reasoning.
        """
        scanner = self.scanner
        prose = Prose(Reasoning, trim=True)
        while True:
            scanner.hold()
            yield from scanner.space()
            if not (yield from scanner.either(thinking.begin)):
                break
        yield prose.add(scanner.release())
        marker = yield from scanner.until(markers(thinking.end, *begin), prose.add)
        if marker and marker != thinking.end:
            scanner.hold(marker)
            marker = yield from scanner.until(markers(thinking.end), _nothing)
            draft = scanner.release()
            if marker or scanner.cut_off:
                yield prose.add(draft.removesuffix(thinking.end))
            else:
                scanner.unread(draft)
                self.prose = prose
                return
        if not marker:
            yield prose.finish()
        self.content.marker()


def _nothing(text: str) -> None:
    """The text is held."""
