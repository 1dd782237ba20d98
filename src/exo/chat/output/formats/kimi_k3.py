"""The format of Kimi K3: elements between control tokens, ``<|open|>argument key="city" type="string"<|sep|>Paris…``.

Published in the model's chat template. An argument has its type as an attribute, so that its text needs no schema. A
call may also have all its arguments as one JSON object, in an element "json".
"""

import re
from collections.abc import Sequence

from exo.chat.grammar.builder import GrammarBuilder
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.arguments import Field, fields, to_json, typed_to_json
from exo.chat.output.format import OutputFormat
from exo.chat.output.parser import ReplyState, Thinking, skip
from exo.chat.output.scanner import Scanner, Steps, markers

_OPEN, _CLOSE, _SEPARATOR = "<|open|>", "<|close|>", "<|sep|>"
_CALL, _ARGUMENT, _JSON = f"{_OPEN}call ", f"{_OPEN}argument ", f"{_OPEN}json "
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')
_TYPES = {"integer": "number", "number": "number", "boolean": "boolean", "array": "array", "object": "object"}


def _begin(tag: str) -> str:
    return f"{_OPEN}{tag}{_SEPARATOR}"


def _end(tag: str) -> str:
    return f"{_CLOSE}{tag}{_SEPARATOR}"


def _read(reply: ReplyState, marker: str) -> Steps[bool]:
    return (yield from reply.several(_CALL, _end("tools"), lambda: _read_call(reply), begun=marker == _CALL))


def _read_call(reply: ReplyState) -> Steps[bool]:
    scanner = reply.scanner
    name = (yield from _attributes(scanner)).get("tool")
    yield from scanner.space()
    follows = yield from scanner.either(_ARGUMENT, _JSON, _end("call"))
    if not name or not follows:
        return False
    yield reply.call(name)
    if follows == _JSON:
        yield from scanner.until(markers(_SEPARATOR), skip)
        yield from scanner.space()
        whole = yield from reply.json_arguments()
        yield from scanner.either(_end("json"))
        yield from scanner.either(_end("call"))
        return whole
    while follows == _ARGUMENT:
        attributes = yield from _attributes(scanner)
        key = attributes.get("key")
        pieces: list[str] = []
        if key is None or not (yield from scanner.until(markers(_end("argument")), pieces.append)):
            return False
        text, kind, schema = "".join(pieces), attributes.get("type"), reply.schema(name)
        value = typed_to_json(text, kind == "string", schema, key) if kind else to_json(text, schema, key)
        yield reply.argument(key, value)
        yield from scanner.space()
        follows = yield from scanner.either(_ARGUMENT, _end("call"))
    if not follows:
        return False
    yield reply.end_arguments()
    return True


def _attributes(scanner: Scanner) -> Steps[dict[str, str]]:
    """Reads the attributes of an element, and the separator after them."""
    pieces: list[str] = []
    yield from scanner.until(markers(_SEPARATOR), pieces.append)
    found = _ATTRIBUTE.findall("".join(pieces))
    return {name: value.replace("&quot;", '"').replace("&amp;", "&") for name, value in found}


def _escaped(value: str) -> str:
    return value.replace("&", "&amp;").replace('"', "&quot;")


def _write(grammar: GrammarBuilder, tools: Sequence[Tool], parallel: bool) -> str:
    calls = [
        grammar.sequence(
            grammar.plain(f'tool="{_escaped(tool.name)}" index="'),
            "/[0-9]{1,3}/",
            grammar.marked(f'"{_SEPARATOR}'),
            _write_arguments(grammar, tool),
        )
        for tool in tools
    ]
    call = grammar.sequence(grammar.marked(_CALL), grammar.one_of(calls), grammar.marked(_end("call")))
    # The reply begins inside a response, or must begin one after reasoning. Either way the response is empty.
    response = grammar.sequence(f"({grammar.marked(_begin('response'))})?", grammar.marked(_end("response")))
    return grammar.sequence(
        f"{response}?",
        grammar.marked(_begin("tools")),
        grammar.several(call, "", parallel),
        grammar.marked(_end("tools")),
    )


def _write_arguments(grammar: GrammarBuilder, tool: Tool) -> str:
    """Returns the expression of each argument, or of one JSON object if an argument's type is not certain."""
    try:
        members = [_write_argument(grammar, field) for field in fields(tool)]
    except ValueError:
        before, after = f'{_JSON}type="object"{_SEPARATOR}', _end("json")
        return grammar.sequence(grammar.marked(before), grammar.json(tool.schema), grammar.marked(after))
    return grammar.sequence(*members)


def _write_argument(grammar: GrammarBuilder, field: Field) -> str:
    """Raises ``ValueError`` if values of the field may be of several types."""
    kind = field.schema.get("type") if isinstance(field.schema, dict) else None
    text = field.is_text or field.choices
    if not text and not (isinstance(kind, str) and kind in _TYPES):
        raise ValueError(field.name)
    written = "string" if text else _TYPES[str(kind)]
    before = f'{_ARGUMENT}key="{_escaped(field.name)}" type="{written}"{_SEPARATOR}'
    member = grammar.sequence(grammar.marked(before), field.written(grammar, _end("argument")))
    return member if field.required else f"{member}?"


FORMATS = (
    OutputFormat(
        "kimi-k3",
        special=True,
        thinking=Thinking(_begin("think"), _end("think")),
        opening=(_begin("response"),),
        frame=(_end("response"), _end("message")),
        begin=(_begin("tools"), _CALL),
        stray=(_end("tools"), _end("call")),
        read_calls=_read,
        write_calls=_write,
    ),
)
