"""The format of Kimi K3: elements between control tokens, ``<|open|>argument key="city" type="string"<|sep|>Paris…``.

Published in the model's chat template. An argument tells its type, so that its text needs no schema. A call may also
hold all its arguments as one JSON object, in an element called "json".
"""

import json
import re
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from exo.chat.grammar.builder import Grammar
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.call_fields import Field, fields, to_json, typed_to_json
from exo.chat.output.format import OutputFormat
from exo.chat.output.parser import Reply, Thinking
from exo.chat.output.scanner import Scanner, Steps, markers

_OPEN, _CLOSE, _SEPARATOR = "<|open|>", "<|close|>", "<|sep|>"
_CALL, _ARGUMENT, _JSON = f"{_OPEN}call ", f"{_OPEN}argument ", f"{_OPEN}json "
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')
_TYPES = {"integer": "number", "number": "number", "boolean": "boolean", "array": "array", "object": "object"}


def _begin(tag: str) -> str:
    return f"{_OPEN}{tag}{_SEPARATOR}"


def _end(tag: str) -> str:
    return f"{_CLOSE}{tag}{_SEPARATOR}"


def _read(reply: Reply, marker: str) -> Steps[bool]:
    return (yield from reply.several(_CALL, _end("tools"), lambda: _call(reply), begun=marker == _CALL))


def _call(reply: Reply) -> Steps[bool]:
    scanner = reply.scanner
    name = (yield from _attributes(scanner)).get("tool")
    yield from scanner.space()
    follows = yield from scanner.either(_ARGUMENT, _JSON, _end("call"))
    if not name or not follows:
        return False
    yield reply.call(name)
    if follows == _JSON:
        yield from scanner.until(markers(_SEPARATOR), _nothing)
        yield from scanner.space()
        whole = yield from reply.json_arguments()
        yield from scanner.either(_end("json"))
        yield from scanner.either(_end("call"))
        return whole
    before = "{"
    while follows == _ARGUMENT:
        attributes = yield from _attributes(scanner)
        key = attributes.get("key")
        text: list[str] = []
        if key is None or not (yield from scanner.until(markers(_end("argument")), text.append)):
            return False
        value = _value("".join(text), attributes.get("type"), reply.schema(name), key)
        yield reply.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: {value}")
        before = ", "
        yield from scanner.space()
        follows = yield from scanner.either(_ARGUMENT, _end("call"))
    if not follows:
        return False
    yield reply.arguments("{}" if before == "{" else "}")
    return True


def _attributes(scanner: Scanner) -> Steps[dict[str, str]]:
    """Reads the attributes of an element, and the separator behind them."""
    pieces: list[str] = []
    yield from scanner.until(markers(_SEPARATOR), pieces.append)
    found = _ATTRIBUTE.findall("".join(pieces))
    return {name: value.replace("&quot;", '"').replace("&amp;", "&") for name, value in found}


def _escaped(value: str) -> str:
    return value.replace("&", "&amp;").replace('"', "&quot;")


def _nothing(text: str) -> None:
    """The attributes of an element in JSON say nothing."""


def _value(text: str, kind: str | None, parameters: Mapping[str, JsonValue], key: str) -> str:
    """The JSON of an argument, of which the type may be missing."""
    return typed_to_json(text, kind == "string", parameters, key) if kind else to_json(text, parameters, key)


def _write(grammar: Grammar, tools: Sequence[Tool], parallel: bool) -> str:
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
    # The reply begins inside the response, or has to begin one after reasoning: either way it is empty.
    response = grammar.sequence(f"({grammar.marked(_begin('response'))})?", grammar.marked(_end("response")))
    return grammar.sequence(
        f"{response}?",
        grammar.marked(_begin("tools")),
        grammar.several(call, "", parallel),
        grammar.marked(_end("tools")),
    )


def _write_arguments(grammar: Grammar, tool: Tool) -> str:
    """Each argument by itself; all as one object where an argument's type is not certain."""
    try:
        members = [_write_argument(grammar, field) for field in fields(tool)]
    except ValueError:
        before, after = f'{_JSON}type="object"{_SEPARATOR}', _end("json")
        return grammar.sequence(grammar.marked(before), grammar.json(tool.schema), grammar.marked(after))
    return grammar.sequence(*members)


def _write_argument(grammar: Grammar, field: Field) -> str:
    """Raises ``ValueError`` where values of the field may be of several types."""
    end = _end("argument")
    kind = field.schema.get("type") if isinstance(field.schema, dict) else None
    if field.is_text:
        kind, value = "string", grammar.text_until(end)
    elif field.choices:
        kind, value = "string", grammar.sequence(grammar.one_of([*map(json.dumps, field.choices)]), grammar.marked(end))
    elif isinstance(kind, str) and kind in _TYPES:
        kind, value = _TYPES[kind], grammar.sequence(grammar.json(field.schema), grammar.marked(end))
    else:
        raise ValueError(field.name)
    before = f'{_ARGUMENT}key="{_escaped(field.name)}" type="{kind}"{_SEPARATOR}'
    member = grammar.sequence(grammar.marked(before), value)
    return member if field.required else f"{member}?"


KIMI_K3 = OutputFormat(
    "kimi-k3",
    special=True,
    thinking=Thinking(_begin("think"), _end("think")),
    opening=(_begin("response"),),
    frame=(_end("response"), _end("message")),
    begin=(_begin("tools"), _CALL),
    stray=(_end("tools"), _end("call")),
    read_call=_read,
    write_calls=_write,
)
