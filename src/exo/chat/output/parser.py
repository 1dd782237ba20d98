"""The parser of one reply, and the state that the parsers of all formats share."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import final

from pydantic import JsonValue

from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.chat.output.json_scanner import JsonObject
from exo.chat.output.scanner import MORE, Scanner, Steps, markers

# Text that may follow arguments without closing brackets: the end, or the beginning of a format's marker.
_MARKUP = ("", "<", "`", "[")
_PLAIN = re.compile(r"</?[\w:]+>|[\w ]+:")
_FENCE = re.compile(r" *(```|~~~)")
_LINE_PREFIX = 40
"""Characters that suffice to recognise a code fence."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """The markers around reasoning."""

    begin: str
    end: str

    @property
    def anywhere(self) -> bool:
        """Whether ``begin`` counts anywhere in the reply, and not only before the answer."""
        return not is_plain(self.begin)


def is_plain(marker: str) -> bool:
    """Whether the marker is a tag or a phrase, which an answer may contain as text."""
    return _PLAIN.fullmatch(marker) is not None


@final
class OutputParser:
    """Parses one reply as its text arrives. The parts do not depend on how the text was cut into pieces."""

    def __init__(self, scanner: Scanner, steps: Steps[None]) -> None:
        self._scanner = scanner
        self._steps = steps

    def push(self, text: str) -> list[Part]:
        """Returns the parts that ``text`` completes."""
        self._scanner.feed(text)
        return self._advance()

    def finish(self, *, cut_off: bool = False) -> list[Part]:
        """Returns the parts held back. Never raises.

        Set ``cut_off`` if something other than the model ended the reply. Then an unfinished call is not completed, and
        its markup is not content.
        """
        self._scanner.end(cut_off=cut_off)
        return self._advance()

    def _advance(self) -> list[Part]:
        parts: list[Part] = []
        for step in self._steps:
            if step is MORE:
                break
            if step is not None:
                parts.append(step)
        return [_joined(list(run)) for _, run in groupby(parts, _kind)]


def _kind(part: Part) -> tuple[type[Part], int]:
    return type(part), part.index if isinstance(part, ToolCall | Arguments | BrokenCall) else 0


def _joined(run: list[Part]) -> Part:
    first = run[0]
    if isinstance(first, ToolCall | BrokenCall):
        return first
    return replace(first, text="".join(part.text for part in run if not isinstance(part, ToolCall | BrokenCall)))


@final
class Prose:
    """Text between markers, without the white space next to a marker. White space is held until more text follows."""

    def __init__(self, part: Callable[[str], Part], *, trim: bool) -> None:
        """With ``trim``, the text begins after a marker."""
        self.begun = False
        """Whether there is text already."""
        self._part = part
        self._trim = trim
        self._space: list[str] = []
        self._before_marker: tuple[list[str], bool] = ([], trim)
        self._line = ""
        """The beginning of the last line."""
        self._fence = ""
        """The fence that ends the current code block."""

    @property
    def at_line(self) -> bool:
        """Whether a line begins here, outside a fenced code block."""
        return not self._fence and not self._line.strip()

    def add(self, text: str) -> Part | None:
        """Appends text."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if (match := _FENCE.match(line)) and self._fence in ("", match[1]):
                self._fence = "" if self._fence else match[1]
        self._line = self._line[:_LINE_PREFIX]
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
        """Notes a marker."""
        self._before_marker = (self._space, self._trim)
        self._space = []
        self._trim = True

    def unmark(self) -> None:
        """Takes back ``marker``, if no text was added since."""
        self._space, self._trim = self._before_marker

    def paragraph(self) -> None:
        """Begins a paragraph."""
        self._space = [] if self._trim else ["\n\n"]

    def finish(self) -> Part | None:
        """Ends the text."""
        space = "".join(self._space)
        self._space.clear()
        return self._part(space) if space and not self._trim else None


@final
class ReplyState:
    """The state of one reply's parser: the scanner, the text so far and the calls so far."""

    def __init__(self, scanner: Scanner, tools: Sequence[Tool] | bool) -> None:
        """``tools`` as in ``OutputFormat.parser``."""
        self.scanner = scanner
        self.content = Prose(Content, trim=False)
        self.prose = self.content
        """The prose that gets text outside calls: the content, or reasoning that the model never ends."""
        self.calls_allowed = bool(tools)
        self._schemas = {} if isinstance(tools, bool) else {tool.name: tool.parameters for tool in tools}
        self._calls = 0
        self._members = 0
        self._begun = False
        """Whether the current call has begun, so that it has been reported."""
        self._marked = False
        self._before = 0
        """The number of calls before the current attempt to read some."""

    def schema(self, name: str) -> Mapping[str, JsonValue]:
        """Returns the JSON Schema of a tool's arguments, empty if unknown."""
        return self._schemas.get(name, {})

    def knows(self, name: str) -> bool:
        """Whether the request has a tool of this name, or its tools are unknown."""
        return name in self._schemas or not self._schemas

    def offers(self, name: str) -> bool:
        """Whether the request has a tool of this name."""
        return name in self._schemas

    def suits(self, name: str, arguments: str) -> bool:
        """Whether the schema of tool ``name`` has these arguments, a JSON object, and requires no other.

        Values are not examined.
        """
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
        """Begins an attempt to read calls, after ``marker``."""
        self._marked = bool(marker)
        self._before = self._calls
        self.next_call(marker)

    def call(self, name: str) -> ToolCall:
        """Begins a call. Its text stays held until the call is complete."""
        self.prose.marker()
        self._begun = True
        self._calls += 1
        self._members = 0
        return ToolCall(self._calls - 1, name)

    def arguments(self, text: str) -> Arguments | None:
        """Adds to the arguments of the current call."""
        return Arguments(self._calls - 1, text) if text else None

    def argument(self, name: str, value: str = "") -> Arguments:
        """Begins the next argument of the current call. ``value`` is JSON."""
        before = ", " if self._members else "{"
        self._members += 1
        return Arguments(self._calls - 1, f"{before}{json.dumps(name, ensure_ascii=False)}: {value}")

    def end_arguments(self) -> Arguments:
        """Ends the arguments of the current call, which were added with ``argument``."""
        return Arguments(self._calls - 1, "}" if self._members else "{}")

    def next_call(self, marker: str = "") -> None:
        """Completes the current call. Another one may begin, after ``marker``."""
        self.scanner.hold(marker)
        self._begun = False

    def end(self, *, whole: bool) -> Steps[bool]:
        """Ends the attempt to read calls. Text that is not a ``whole`` call is content, unless it was cut off.

        Returns whether the last call, or all that the attempt has read, is content.
        """
        text = self.scanner.release()
        if whole:
            return False
        cut_off = self.scanner.at_end and self.scanner.cut_off
        if self._begun:
            yield BrokenCall(self._calls - 1, cut_off)
        # A call that was cut off shows no markup. Without a marker, only a tool's name reveals that it is a call.
        if not text or (cut_off and (self._begun or self._marked or any(name in text for name in self._schemas))):
            return False
        if self._begun:
            self.prose.unmark()
        yield self.prose.add(text)
        return self._begun or self._calls == self._before

    def several(self, begin: str, end: str, read: Callable[[], Steps[bool]], *, begun: bool = False) -> Steps[bool]:
        """Reads calls that each follow ``begin``, the last one followed by ``end``. ``read`` reads one of them.

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

    def call_in_json(self, name: str) -> Steps[bool]:
        """Reads white space and a call's arguments, a JSON object. Returns false if there is no complete object."""
        yield from self.scanner.space()
        if not name or (yield from self.scanner.peek()) != "{":
            return False
        yield self.call(name)
        return (yield from self.json_arguments())

    def json_arguments(self) -> Steps[bool]:
        """Reads a JSON object as the current call's arguments. Returns false if it is invalid or cut off."""
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
        """Reads reasoning up to the answer. With ``inside``, the reply begins within it. ``begin`` are calls' markers.

        An end of reasoning without a beginning is dropped: the prompt has ended the reasoning already.
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
        """Reads past the end of reasoning, whose opening marker may be repeated.

        Calls inside reasoning are drafts, and part of it. If the model never ends its reasoning, the draft may be the
        call itself: it is put back to be read as one, and other text around it is reasoning.
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
            marker = yield from scanner.until(markers(thinking.end), skip)
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


def skip(text: str) -> None:
    """For ``Scanner.until``, if the text is needed only as held text or not at all."""
