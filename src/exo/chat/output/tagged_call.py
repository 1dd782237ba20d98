"""Calls whose arguments are written between tags, such as ``<parameter=path>`` and ``</parameter>``.

A value is bare text and may contain the very tags that end it: a model that edits a parser of such calls writes them.
A closing tag ends the value only if another argument of the tool or the end of the call follows. A whole call inside
the value is part of it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from pydantic import JsonValue

from exo.chat.grammar.tool_schema import LONGEST_NAME
from exo.chat.output.arguments import argument_names, argument_strings, to_json, typed_to_json
from exo.chat.output.events import Arguments, Part
from exo.chat.output.json_call import json_call
from exo.chat.output.parser import ReplyState
from exo.chat.output.scanner import Steps, markers

NAME = re.compile(r"[^<>\"\s]*")
_WORD = re.compile(r"[\w.-]*")
_QUOTE = re.compile(r'\\.|(")', re.DOTALL)
_CDATA, _CDATA_END = "<![CDATA[", "]]>"
_JSON_BEGINS = ('"', "[", "{")


@dataclass(frozen=True, slots=True)
class Tags:
    """The markers around the parts of a call, between white space. ``call`` and ``call_end`` may be ""."""

    begin: str
    call: str
    name_end: str
    key: str
    key_end: tuple[str, ...]
    value_end: str
    call_end: str
    end: str
    own_line: bool = False
    """Whether a line break before and after each value is not part of it."""
    text_key_end: str = ""
    """Replaces ``key_end`` before a text, in formats that mark texts."""
    grouped: bool = False
    """Whether several calls are written between one ``begin`` and ``end``."""
    cdata: bool = False
    """Whether a value may be in a CDATA section."""

    @property
    def ends(self) -> tuple[str, ...]:
        """The markers that end a call. The first one comes first if none is missing."""
        return (self.call_end, self.end) if self.call_end else (self.end,)

    def read(self, reply: ReplyState, marker: str) -> Steps[bool]:
        """Reads on after ``begin``, or after ``call`` if the model left out ``begin``."""
        scanner = reply.scanner
        bare = bool(self.call) and marker == self.call
        if not bare:
            yield from scanner.space()
            if (yield from scanner.peek()) == "{":  # some models write JSON between the tags of their template
                if whole := (yield from json_call(reply, marked=True)):
                    yield from scanner.space()
                    yield from scanner.either(self.end)
                return whole
        if not self.call:
            return (yield from self._call(reply, known=False))
        return (yield from reply.several(self.call, self.end, lambda: self._call(reply, known=bare), begun=bare))

    def _call(self, reply: ReplyState, *, known: bool) -> Steps[bool]:
        """Reads one call from its name on. With ``known``, it counts only if the request has a tool of this name."""
        name = yield from reply.scanner.run(NAME, LONGEST_NAME)
        if not name or (known and not reply.knows(name)):
            return False
        if self.name_end and not (yield from reply.scanner.either(self.name_end)):
            return False
        return (yield from _TaggedCall(self, reply, name).read())


@dataclass(frozen=True, slots=True)
class _Key:
    """The beginning of an argument. The name is "" at the end of the call."""

    name: str = ""
    text: bool | None = None
    """Whether the value is marked as a text; None in formats that do not mark texts."""
    seen: str = ""
    """The text read, to be put back if this is no argument."""


@final
class _TaggedCall:
    """The parser of one call after its name."""

    def __init__(self, tags: Tags, reply: ReplyState, name: str) -> None:
        self._tags = tags
        self._reply = reply
        self._scanner = reply.scanner
        self._name = name
        self._schema = reply.schema(name)
        self._names = argument_names(self._schema)
        required = self._schema.get("required")
        self._missing = (
            {each for each in required if isinstance(each, str)} if isinstance(required, list) else set[str]()
        )
        self._used: set[str] = set()
        self._opening = tags.call or tags.begin
        self._stops = markers(tags.value_end, tags.key, self._opening, *tags.ends)

    def read(self) -> Steps[bool]:
        """Reads the arguments and the end of the call."""
        yield from self._scanner.space()
        follows = yield from self._scanner.either(self._tags.key, *self._tags.ends)
        key = (yield from self._key()) if follows == self._tags.key else _Key()
        if not follows or (follows == self._tags.key and not key.name):
            return False
        yield self._reply.call(self._name)
        while key.name:
            yield self._reply.argument(key.name)
            self._used.add(key.name)
            self._missing.discard(key.name)
            following = yield from self._value(key)
            if following is None:
                return False
            key = following
        yield self._reply.end_arguments()
        return True

    def _key(self) -> Steps[_Key]:
        """Reads from ``key`` up to the value. The result has no name if this is no argument."""
        name = yield from self._scanner.run(NAME, LONGEST_NAME)
        seen, is_text = name, None
        for text in self._tags.key_end:
            seen += yield from self._scanner.space()
            found = yield from self._scanner.either(*filter(None, (self._tags.text_key_end, text)))
            seen += found
            if not found:
                return _Key(seen=seen)
            is_text = found == self._tags.text_key_end if self._tags.text_key_end else None
        return _Key(name, is_text, seen)

    def _value(self, key: _Key) -> Steps[_Key | None]:
        """Reads a value and its end. Returns the next argument, or None if the value does not end.

        A tag inside the value may look like one that ends it, so what follows it decides. Where that leaves a doubt,
        the place is remembered, and the value ends there unless a better end comes.
        """
        tags, scanner = self._tags, self._scanner
        value = _Value(self._reply, self._schema, key, tags)
        depth = 0  # calls open inside the value
        while marker := (yield from scanner.until(self._stops, value.add)):
            seen = marker
            if marker == self._opening:
                name = yield from self._called()
                if name and value.may_have_ended and self._reply.knows(name):
                    scanner.unread(marker)
                    return (yield from self._ended(value))
                depth += bool(name)
            closed = marker == tags.value_end
            if closed:
                seen += yield from scanner.space()
                marker = yield from scanner.either(tags.key, *tags.ends)
                seen += marker
            if (
                marker == tags.key
                and depth == 0
                and not value.in_string
                and (closed or value.at_line or not tags.own_line)
            ):
                following = yield from self._key()
                seen += following.seen
                if self._is_next(following.name, value):
                    yield from value.end(on_own_line=closed)
                    return following
            elif marker == "" and scanner.at_end and depth == 0 and not scanner.cut_off:
                yield from value.end(on_own_line=True)
                return _Key()
            elif marker in tags.ends and (closed or depth or not value.may_have_ended):
                if (yield from self._is_end(marker, closed, nested=depth > 0)):
                    if depth or not (value.in_string or (closed and self._missing)):
                        yield from value.end(on_own_line=closed)
                        return _Key()
                    yield value.may_end(seen)
                    continue
                if closed and depth == 0 and marker == tags.call_end:
                    yield value.may_end(seen)
                    continue
                if marker == tags.ends[0]:
                    depth = max(0, depth - 1)
            if scanner.at_end and scanner.cut_off:
                return None  # ``seen`` is the beginning of a tag
            yield value.add(seen)
        return (yield from self._ended(value)) if value.may_have_ended and not scanner.cut_off else None

    def _is_next(self, name: str, value: "_Value") -> bool:
        """Whether an argument of this name may follow. Models invent arguments, but hardly amid a long text."""
        known = self._names is None or name in self._names or not value.several_lines
        return bool(name) and name not in self._used and known

    def _is_end(self, end: str, closed: bool, *, nested: bool) -> Steps[bool]:
        """Whether the text after ``end``, which stays unread, shows that it ends the call.

        With ``closed``, the value was closed before ``end``. With ``nested``, ``end`` ends a call inside the value.
        """
        tags, scanner = self._tags, self._scanner
        if closed and not nested and end == tags.end:
            return True
        seen = yield from scanner.space()
        if end == tags.call_end and (found := (yield from scanner.either(tags.end))):
            seen += found
            if nested:
                seen += yield from scanner.space()
            is_end = not nested or not (yield from scanner.peek())
        elif nested:
            is_end = not (yield from scanner.peek())
        else:
            found = yield from scanner.either(*{tags.begin, self._opening})
            seen += found
            is_end = bool(found) or scanner.at_end
        scanner.unread(seen)
        return is_end

    def _called(self) -> Steps[str]:
        """Returns the name in the call that begins here, or "" if none does. Reads nothing."""
        seen = yield from self._scanner.space()
        name = yield from self._scanner.run(_WORD, LONGEST_NAME)
        name_end = (yield from self._scanner.either(self._tags.name_end)) if self._tags.name_end else ""
        self._scanner.unread(seen + name + name_end)
        return name if name_end or not self._tags.name_end else ""

    def _ended(self, value: "_Value") -> Steps[_Key]:
        """Ends the value at the last place where it may have ended, and puts back the text after it."""
        self._scanner.unread(value.after_end())
        yield from value.end(on_own_line=True)
        return _Key()


@final
class _Value:
    """A value as it arrives. If it is certain to be a text, it is passed on at once, as a JSON string."""

    def __init__(self, reply: ReplyState, schema: Mapping[str, JsonValue], key: _Key, tags: Tags) -> None:
        accepted = argument_strings(schema, key.name)
        is_text = accepted is not None and accepted.every
        only_json = accepted is not None and not accepted.every and not accepted.texts
        self._reply = reply
        self._schema = schema
        self._key = key
        self._own_line = tags.own_line
        self._streams = is_text and key.text is not False and not tags.cdata
        self._as_json = only_json if key.text is None else not key.text
        self._cdata = tags.cdata
        self._bounds = ("", "")
        """The first and last characters, to recognise a CDATA section."""
        self._escape = ""
        self._quotes = 0
        self._begun = False
        self.at_line = True
        """Whether a line begins here."""
        self.several_lines = False
        """Whether there is a line break within the text."""
        self._line_break: bool | None = None
        """Whether a line break follows the last character that is not white space; None before the first."""
        self._text: list[str] = []
        """The whole value if it does not stream, else the white space at its end."""
        self._after_end: list[str] | None = None
        """The closing tags at the last place where the value may have ended, and the text after them."""

    @property
    def may_have_ended(self) -> bool:
        return self._after_end is not None

    @property
    def in_string(self) -> bool:
        """Whether the value is inside a string of JSON or a CDATA section, where tags mean nothing."""
        if self._cdata and self._bounds[0] == _CDATA:
            return self._bounds[1] != _CDATA_END
        return self._as_json and self._quotes % 2 == 1

    def add(self, text: str) -> Part | None:
        """Appends to the value, or to the text after a place where it may have ended."""
        self.at_line = text.endswith("\n")
        if body := text.rstrip():
            line_break = self._line_break or "\n" in (body.lstrip() if self._line_break is None else body)
            self.several_lines = self.several_lines or line_break
            self._line_break = False
        if self._line_break is not None:
            self._line_break = self._line_break or "\n" in text[len(body) :]
        if self._after_end is not None:
            self._after_end.append(text)
            return None
        return self._more(text)

    def may_end(self, tags: str) -> Part | None:
        """Notes that the value may have ended before ``tags``. A later end takes precedence."""
        part = self._go_on()
        self._after_end = [tags]
        return part

    def after_end(self) -> str:
        """Returns the text after the closing tags at the place where the value may have ended."""
        after, self._after_end = self._after_end or [""], None
        return "".join(after[1:])

    def end(self, *, on_own_line: bool) -> Steps[None]:
        """Ends the value. Unless it ends ``on_own_line`` as it should, white space before the end is dropped."""
        yield self._go_on()
        text = "".join(self._text)
        if not self._streams:
            text = text.removeprefix("\n") if self._own_line else text
            text = text.removesuffix("\n" if self._own_line else "") if on_own_line else text.rstrip()
            yield self._reply.arguments(self._converted(text))
            return
        text = text.removesuffix("\n" if self._own_line else "") if on_own_line else ""
        yield self._escaped(text.removeprefix("\n") if self._own_line and not self._begun and text else text)
        yield self._reply.arguments('"' if self._begun else '""')

    def _converted(self, text: str) -> str:
        if self._cdata and text.startswith(_CDATA) and text.endswith(_CDATA_END):
            text = text.removeprefix(_CDATA).removesuffix(_CDATA_END)
        if self._key.text is None:
            return to_json(text, self._schema, self._key.name)
        return typed_to_json(text, self._key.text, self._schema, self._key.name)

    def _go_on(self) -> Part | None:
        after, self._after_end = self._after_end, None
        return self._more("".join(after)) if after else None

    def _more(self, text: str) -> Part | None:
        if not self._streams:
            self._count(text)
            self._text.append(text)
            first, last = self._bounds
            self._bounds = (first + text)[: len(_CDATA)], (last + text)[-len(_CDATA_END) :]
            return None
        body = text.rstrip()
        if not body:
            self._text.append(text)
            return None
        whole = "".join(self._text) + body
        self._text = [text[len(body) :]]
        return self._escaped(whole.removeprefix("\n") if self._own_line and not self._begun else whole)

    def _escaped(self, text: str) -> Arguments | None:
        if not text:
            return None
        quote = "" if self._begun else '"'
        self._begun = True
        return self._reply.arguments(quote + json.dumps(text, ensure_ascii=False)[1:-1])

    def _count(self, text: str) -> None:
        """Counts the quotation marks that begin or end a JSON string."""
        if not self._as_json:
            return
        if not self._begun and (first := text.lstrip()[:1]):
            self._begun = True
            self._as_json = first in _JSON_BEGINS
        text = self._escape + text
        backslashes = len(text) - len(text.rstrip("\\"))
        self._escape = "\\" * (backslashes % 2)
        self._quotes += sum(match[1] is not None for match in _QUOTE.finditer(text.removesuffix(self._escape)))
