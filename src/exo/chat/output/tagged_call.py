"""Reading calls whose arguments stand between tags, such as ``<parameter=path>`` and ``</parameter>``.

A value is bare text and may contain the very tags that end it: a model that edits a parser of such calls writes them.
What comes behind a closing tag tells whether the value ends there. It does if another argument that the tool has
follows, or the end of the call; a call that is written out inside the value is part of it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from pydantic import JsonValue

from exo.chat.output.argument_schema import argument_names
from exo.chat.output.call_fields import is_text, to_json, typed_to_json, written_as_json
from exo.chat.output.events import Arguments, Part
from exo.chat.output.json_call import LONGEST_NAME, json_call
from exo.chat.output.parser import Reply
from exo.chat.output.scanner import Steps, markers

NAME = re.compile(r"[^<>\"\s]*")
"""The characters of names."""

_WORD = re.compile(r"[\w.-]*")
_QUOTE = re.compile(r'\\.|(")', re.DOTALL)
_CDATA, _CDATA_END = "<![CDATA[", "]]>"
_JSON_BEGINS = ('"', "[", "{")


@dataclass(frozen=True, slots=True)
class Tags:
    """The texts around the parts of a call. White space between them means nothing."""

    begin: str
    call: str
    """Before the name; empty where nothing but ``begin`` is."""
    named: str
    key: str
    keyed: tuple[str, ...]
    value_end: str
    call_end: str
    """Empty where nothing but ``end`` is."""
    end: str
    own_line: bool
    """Whether a line break before and after each value is not part of it."""
    text_keyed: str = ""
    """The same as ``keyed`` for a text, where the model tells texts and JSON apart; ``keyed`` is then for JSON."""
    grouped: bool = False
    """Whether several calls are written between one ``begin`` and ``end``."""
    cdata: bool = False
    """Whether a value may be in a CDATA section."""

    @property
    def ends(self) -> tuple[str, ...]:
        """What ends a call, the first where nothing is left out."""
        return (self.call_end, self.end) if self.call_end else (self.end,)

    def read(self, reply: Reply, marker: str) -> Steps[bool]:
        """Reads on behind ``begin``, or behind ``call`` where the model left ``begin`` out."""
        bare = bool(self.call) and marker == self.call
        if not bare:
            yield from reply.scanner.space()
            if (yield from reply.scanner.peek()) == "{":
                return (yield from self._json(reply))
        if not self.call:
            return (yield from self._call(reply, known=False))
        return (yield from reply.several(self.call, self.end, lambda: self._call(reply, known=bare), begun=bare))

    def _json(self, reply: Reply) -> Steps[bool]:
        """Reads a call in JSON, which some models write between the tags of their template."""
        if not (yield from json_call(reply, marked=True)):
            return False
        yield from reply.scanner.space()
        yield from reply.scanner.either(self.end)
        return True

    def _call(self, reply: Reply, *, known: bool) -> Steps[bool]:
        """Reads one call from its name on, which must be that of a tool if it is to be ``known``."""
        scanner = reply.scanner
        name = yield from scanner.run(NAME, LONGEST_NAME)
        if (
            not name
            or (known and not reply.knows(name))
            or (self.named and not (yield from scanner.either(self.named)))
        ):
            return False
        return (yield from _TaggedCall(self, reply, name).read())


@dataclass(frozen=True, slots=True)
class _Key:
    """An argument that begins; at the end of a call without a name."""

    name: str = ""
    text: bool | None = None
    """Whether its value is text, where the model tells."""
    seen: str = ""
    """All that was read of it."""


@final
class _TaggedCall:
    """One call, from behind its name on."""

    def __init__(self, tags: Tags, reply: Reply, name: str) -> None:
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
        before = "{"
        while key.name:
            yield self._reply.arguments(f"{before}{json.dumps(key.name, ensure_ascii=False)}: ")
            self._used.add(key.name)
            self._missing.discard(key.name)
            following = yield from self._value(key)
            if following is None:
                return False
            key, before = following, ", "
        yield self._reply.arguments("{}" if before == "{" else "}")
        return True

    def _key(self) -> Steps[_Key]:
        """Reads what stands between ``key`` and the value; without a name if it is something else."""
        name = yield from self._scanner.run(NAME, LONGEST_NAME)
        seen, is_text = name, None
        for text in self._tags.keyed:
            seen += yield from self._scanner.space()
            found = yield from self._scanner.either(*filter(None, (self._tags.text_keyed, text)))
            seen += found
            if not found:
                return _Key(seen=seen)
            is_text = found == self._tags.text_keyed if self._tags.text_keyed else None
        return _Key(name, is_text, seen)

    def _value(self, key: _Key) -> Steps[_Key | None]:
        """Reads a value and its end. Returns the next argument.

        None where the value does not end.
        """
        tags, scanner = self._tags, self._scanner
        value = _Value(self._reply, self._schema, key, tags)
        depth = 0
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
                return None  # what was seen is the beginning of a tag
            yield value.add(seen)
        return (yield from self._ended(value)) if value.may_have_ended and not scanner.cut_off else None

    def _is_next(self, name: str, value: "_Value") -> bool:
        """Whether the call may go on with this argument. Models invent some, but hardly in the midst of a long text."""
        known = self._names is None or name in self._names or not value.several_lines
        return bool(name) and name not in self._used and known

    def _is_end(self, end: str, closed: bool, *, nested: bool) -> Steps[bool]:
        """Whether what comes behind ``end`` shows that it ends the call. ``closed`` if the value was closed before it.

        Nothing of what comes behind is read.
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
        """The name in a call that begins here; empty where none does. Nothing is read."""
        seen = yield from self._scanner.space()
        name = yield from self._scanner.run(_WORD, LONGEST_NAME)
        named = (yield from self._scanner.either(self._tags.named)) if self._tags.named else ""
        self._scanner.unread(seen + name + named)
        return name if named or not self._tags.named else ""

    def _ended(self, value: "_Value") -> Steps[_Key]:
        """The value has ended where it may have; what came behind it is still to be read."""
        self._scanner.unread(value.behind())
        yield from value.end(on_own_line=True)
        return _Key()


@final
class _Value:
    """One value as it comes. What is text whatever it looks like is passed on at once, as JSON."""

    def __init__(self, reply: Reply, schema: Mapping[str, JsonValue], key: _Key, tags: Tags) -> None:
        self._reply = reply
        self._schema = schema
        self._key = key
        self._own_line = tags.own_line
        told = key.text is not None
        self._streams = is_text(schema, key.name) and key.text is not False and not tags.cdata
        self._as_json = not key.text if told else written_as_json(schema, key.name)
        self._cdata = tags.cdata
        self._bounds = ("", "")
        """The first and last characters."""
        self._escape = ""
        self._quotes = 0
        self._begun = False
        self.at_line = True
        """Whether a line begins here."""
        self.several_lines = False
        """Whether there is a line break within the text."""
        self._line_break: bool | None = None
        """Whether one came after the last character that is no white space; None before the first."""
        self._text: list[str] = []
        """All of a value that does not stream; otherwise the white space at the end."""
        self._behind: list[str] | None = None
        """What came behind a place where the value may have ended, beginning with the closing tags."""

    @property
    def may_have_ended(self) -> bool:
        return self._behind is not None

    @property
    def in_string(self) -> bool:
        """Whether the value is inside a string of JSON or a CDATA section, where tags mean nothing."""
        if self._cdata and self._bounds[0] == _CDATA:
            return self._bounds[1] != _CDATA_END
        return self._as_json and self._quotes % 2 == 1

    def add(self, text: str) -> Part | None:
        """More of the value, or of what comes behind it."""
        self.at_line = text.endswith("\n")
        if body := text.rstrip():
            line_break = self._line_break or "\n" in (body.lstrip() if self._line_break is None else body)
            self.several_lines = self.several_lines or line_break
            self._line_break = False
        if self._line_break is not None:
            self._line_break = self._line_break or "\n" in text[len(body) :]
        if self._behind is not None:
            self._behind.append(text)
            return None
        return self._more(text)

    def may_end(self, tags: str) -> Part | None:
        """The value may have ended before ``tags``, unless a better end comes."""
        part = self._go_on()
        self._behind = [tags]
        return part

    def behind(self) -> str:
        """What came behind the tags of the place where the value may have ended."""
        behind, self._behind = self._behind or [""], None
        return "".join(behind[1:])

    def end(self, *, on_own_line: bool) -> Steps[None]:
        """The value ends here. Unless it ends ``on_own_line`` as it should, white space before the end is dropped."""
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
        behind, self._behind = self._behind, None
        return self._more("".join(behind)) if behind else None

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
        """Counts the quotation marks that begin or end a string."""
        if not self._as_json:
            return
        if not self._begun and (first := text.lstrip()[:1]):
            self._begun = True
            self._as_json = first in _JSON_BEGINS
        text = self._escape + text
        backslashes = len(text) - len(text.rstrip("\\"))
        self._escape = "\\" * (backslashes % 2)
        self._quotes += sum(match[1] is not None for match in _QUOTE.finditer(text.removesuffix(self._escape)))
