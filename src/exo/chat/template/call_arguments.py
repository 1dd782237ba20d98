"""The arguments of an earlier call as the object that chat templates look into, whatever a client sends back."""

import json
import re
from typing import NoReturn, cast

from pydantic import JsonValue

from exo.chat.output.json_scanner import DEEPEST, JsonObject

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*(?P<end>"?)|[{}\[\]]', re.DOTALL)
_HALF_ESCAPE = re.compile(r"(?<!\\)((?:\\\\)*)\\(?:u[0-9A-Fa-f]{0,3})?$")
_MISSING = ("", "null", ":null")
"""What a cut object may lack before its brackets close: nothing, a value, or a colon and a value."""
_NAME = "arguments"
"""The argument that holds what is no object."""


def arguments_object(arguments: JsonValue) -> dict[str, JsonValue]:
    """The object that ``arguments`` stand for.

    An object that was cut off is closed where it ends. Anything else that is not an object becomes the only argument.
    """
    if isinstance(arguments, dict):
        return arguments
    if not isinstance(arguments, str):
        return {} if arguments is None else {_NAME: arguments}
    text = arguments.strip()
    if text in ("", "null"):
        return {}
    found = JsonObject()
    if found.read(text, 0) == len(text) and found.whole:
        return json.loads(found.taken())
    closed = _closed(text)
    return {_NAME: arguments} if closed is None else closed


def _closed(text: str) -> dict[str, JsonValue] | None:
    """The object whose beginning ``text`` is; None where it is no beginning of one."""
    closers: list[str] = []
    in_string = False
    for token in _TOKEN.finditer(text):
        in_string = token["end"] == ""
        match token[0]:
            case "{":
                closers.append("}")
            case "[":
                closers.append("]")
            case "}" | "]":
                if not closers or closers.pop() != token[0]:
                    return None
            case _:
                pass
    if not text.startswith("{") or not 0 < len(closers) <= DEEPEST:
        return None
    body = _HALF_ESCAPE.sub(r"\1", text) + '"' if in_string else text.rstrip(", \t\r\n")
    for missing in _MISSING:
        try:
            return cast(
                "dict[str, JsonValue]",
                json.loads(body + missing + "".join(reversed(closers)), strict=False, parse_constant=_no_number),
            )
        except ValueError:
            continue
    return None


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)
