"""Scans one JSON object (RFC 8259) as its text arrives, and repairs common mistakes of models.

Models write a comma before a closing bracket, Python's quotes and constants, line breaks in strings and invalid
escapes. The meaning is clear, and the output is valid JSON.
"""

import re
from typing import final

DEEPEST = 128
"""The nesting limit. The client's JSON reader has one too."""

_SPACE = re.compile(r"[ \t\r\n]*")
_PLAIN = {'"': re.compile(r'[^"\\\x00-\x1f]*'), "'": re.compile(r'[^"\'\\\x00-\x1f]*')}
_ESCAPED = re.compile(r'["\\/bfnrt]|u[0-9A-Fa-f]{4}')
_ESCAPE_BEGUN = re.compile(r"u[0-9A-Fa-f]{0,3}")
_WORD = re.compile(r"[-+.\w]*", re.ASCII)
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_LONGEST_WORD = 400
# The end of a truncated value, by what was expected next. A missing value is null.
_TRUNCATED = {
    "in string": '"',
    "in key": '": null',
    "colon": ": null",
    "value": "null",
    "key or }": "",
    "value or ]": "",
}


@final
class JsonObject:
    """Reads one object. When it ends, ``whole`` or ``broken`` becomes true, and nothing more is read."""

    def __init__(self) -> None:
        self.whole = False
        self.broken = False
        self._written: list[str] = []
        self._closers: list[str] = []
        self._expected = "object"
        self._word = ""
        self._escape = ""
        self._quote = '"'
        self._comma: list[str] = []
        """A comma that may prove superfluous, and the white space after it."""

    def read(self, text: str, at: int) -> int:
        """Reads ``text`` from ``at`` on and returns where it stopped: at the end, unless the object ended before."""
        while at < len(text) and not self.whole and not self.broken:
            if self._expected in ("in string", "in key"):
                at = self._string(text, at)
            elif self._expected == "word":
                at = self._read_word(text, at)
            elif (end := _end(_SPACE, text, at)) > at:
                (self._comma or self._written).append(text[at:end])
                at = end
            else:
                at = self._structure(text, at)
        return at

    def taken(self) -> str:
        """Returns the JSON read since the last call."""
        text = "".join(self._written)
        self._written.clear()
        return text

    def pending(self) -> str:
        """Returns the undecided text: a comma, or the beginning of a number, a word or an escape."""
        return "".join(self._comma) + self._word + self._escape

    def complete(self, *, truncated: bool = False) -> bool:
        """Closes the open brackets at the end of the text, if nothing else is missing. Returns ``whole``.

        With ``truncated``, the text may also end in a string or before a value, but not in an incomplete word.
        """
        if self._expected == "word" and (word := _scalar(self._word)):
            self._written.append(word)
            self._word, self._expected = "", "comma"
        if truncated and not self.broken and self._expected in _TRUNCATED:
            self._written.append(_TRUNCATED[self._expected])
            self._expected = "comma"
        if self._expected == "comma" and self._closers:
            self._written += reversed(self._closers)
            self.whole, self.broken = True, False
        return self.whole

    def _write(self, text: str, at: int, end: int) -> int:
        self._written += (*self._comma, text[at:end])
        self._comma.clear()
        return end

    def _structure(self, text: str, at: int) -> int:
        """Reads one character between values."""
        char = text[at]
        expected = self._expected
        if char in "{[" and expected in (("object",) if not self._closers else ("value", "value or ]")):
            self.broken = (char == "[" and not self._closers) or len(self._closers) == DEEPEST
            self._closers.append("}" if char == "{" else "]")
            self._expected = "key or }" if char == "{" else "value or ]"
        elif char in "\"'" and expected in ("key or }", "value", "value or ]"):
            self._expected = "in key" if expected.startswith("key") else "in string"
            self._quote = char
            self._write('"', 0, 1)
            return at + 1
        elif char == ":" and expected == "colon":
            self._expected = "value"
        elif char == "," and expected == "comma":
            self._expected = "key or }" if self._closers[-1] == "}" else "value or ]"
            self._comma.append(char)
            return at + 1
        elif char in "}]" and expected in ("comma", f"key or {char}", f"value or {char}"):
            self.broken = self._closers.pop() != char
            self.whole = not self._closers and not self.broken
            self._expected = "comma"
            self._written += self._comma[1:]
            self._comma.clear()
        elif expected in ("value", "value or ]") and _end(_WORD, char, 0):
            self._expected = "word"
            self._write("", 0, 0)
            return at
        else:
            self.broken = True
        return at if self.broken else self._write(text, at, at + 1)

    def _string(self, text: str, at: int) -> int:
        if self._escape:
            return self._read_escape(text, at)
        if (end := _end(_PLAIN[self._quote], text, at)) > at:
            return self._write(text, at, end)
        char = text[at]
        if char == "\\":
            self._escape = char
            return at + 1
        if char == self._quote:
            self._expected = "colon" if self._expected == "in key" else "comma"
            self._written.append('"')
        else:
            self._written.append('\\"' if char == '"' else f"\\u{ord(char):04x}")
        return at + 1

    def _read_escape(self, text: str, at: int) -> int:
        self._escape += text[at]
        begun = self._escape[1:]
        if _ESCAPED.fullmatch(begun):
            self._written.append(self._escape)
            self._escape = ""
        elif begun == "'":
            self._written.append(begun)
            self._escape = ""
        elif not _ESCAPE_BEGUN.fullmatch(begun):
            self._written.append("\\\\" + begun[:-1])  # an invalid escape: the backslash stands for itself
            self._escape = ""
            return at
        return at + 1

    def _read_word(self, text: str, at: int) -> int:
        """Reads a number or constant. It is written once the character after it has arrived."""
        end = _end(_WORD, text, at)
        self._word += text[at:end]
        word = _scalar(self._word) if end < len(text) else ""
        if len(self._word) > _LONGEST_WORD or (end < len(text) and not word):
            self.broken = True
        elif word:
            self._written.append(word)
            self._word, self._expected = "", "comma"
        return end


def loose_json(text: str) -> str | None:
    """Returns a value in nearly valid JSON as JSON, or None if it is invalid."""
    found = JsonObject()
    before = '{"":'
    wrapped = f"{before}{text}}}"
    end = found.read(wrapped, 0)
    return found.taken()[len(before) : -1] if found.whole and end == len(wrapped) else None


def _scalar(word: str) -> str:
    """Returns a number or constant as JSON, "" for any other word."""
    return _PYTHON.get(word) or (word if _SCALAR.fullmatch(word) else "")


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at
