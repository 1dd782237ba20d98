"""The format of MiniMax M3: each argument is an element of its name, and objects and arrays are nested elements.

Published in the model's chat template. The text ``]<]minimax[>[`` precedes each tag, so that tags in a value are text.
The elements of an array are named "item".
"""

import json
import re
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from exo.chat.grammar.builder import GrammarBuilder
from exo.chat.grammar.tool_schema import LONGEST_NAME, Tool
from exo.chat.output.arguments import Field, fields, to_json
from exo.chat.output.format import OutputFormat
from exo.chat.output.parser import ReplyState, Thinking
from exo.chat.output.scanner import Scanner, Steps, markers

_MARK = "]<]minimax[>["
_BEGIN, _END = f"{_MARK}<tool_call>", f"{_MARK}</tool_call>"
_CALL, _CALL_END = f'{_MARK}<invoke name="', "</invoke>"
_NAME = re.compile(r"[^<>\"\s]*")
_ITEM = "item"
_DEEPEST = 32
_PLAIN_OBJECT = {"type", "properties", "required", "additionalProperties", "title", "description"}
_PLAIN_ARRAY = {"type", "items", "title", "description"}


def _read(reply: ReplyState, marker: str) -> Steps[bool]:
    return (yield from reply.several(_CALL, _END, lambda: _read_call(reply), begun=marker == _CALL))


def _read_call(reply: ReplyState) -> Steps[bool]:
    scanner = reply.scanner
    name = yield from scanner.run(_NAME, LONGEST_NAME)
    if not name or not (yield from scanner.either('">')):
        return False
    yield from scanner.space()
    if not (yield from scanner.either(_MARK)):
        return False
    yield reply.call(name)
    while not (yield from scanner.either(_CALL_END)):
        key = yield from _read_tag(scanner)
        value = (yield from _read_element(scanner, reply.schema(name), key)) if key else None
        if value is None:
            return False
        yield reply.argument(key, value)
        yield from scanner.space()
        if not (yield from scanner.either(_MARK)):
            return False
    yield reply.end_arguments()
    return True


def _read_tag(scanner: Scanner) -> Steps[str]:
    """Reads an opening tag and returns its name, or "" if there is none."""
    if not (yield from scanner.either("<")):
        return ""
    name = yield from scanner.run(_NAME, LONGEST_NAME)
    return name if (yield from scanner.either(">")) else ""


def _read_element(
    scanner: Scanner, parameters: Mapping[str, JsonValue], name: str, depth: int = 0
) -> Steps[str | None]:
    """Reads on after the opening tag of property ``name``. Returns its value as JSON, or None if it is incomplete."""
    end = f"</{name}>"
    pieces: list[str] = []
    if depth == _DEEPEST or not (yield from scanner.until(markers(_MARK), pieces.append)):
        return None
    text = "".join(pieces)
    properties = parameters.get("properties")
    found = properties.get(name) if isinstance(properties, dict) else None
    schema: Mapping[str, JsonValue] = found if isinstance(found, dict) else {}
    listed = schema.get("type") == "array"
    if (yield from scanner.either(end)):
        empty = "" if text else {"array": "[]", "object": "{}"}.get(str(schema.get("type")), "")
        return empty or to_json(text, parameters, name)
    if text.strip():
        return None
    inner: Mapping[str, JsonValue] = {"properties": {_ITEM: schema.get("items")}} if listed else schema
    keys: list[str] = []
    values: list[str] = []
    while not keys or not (yield from scanner.either(end)):
        key = yield from _read_tag(scanner)
        value = (yield from _read_element(scanner, inner, key, depth + 1)) if key else None
        if value is None:
            return None
        keys.append(key)
        values.append(value)
        yield from scanner.space()
        if not (yield from scanner.either(_MARK)):
            return None
    if listed or ("properties" not in schema and set(keys) == {_ITEM}):
        return f"[{', '.join(values)}]"
    pairs = zip(keys, values, strict=True)
    return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in pairs) + "}"


def _write(grammar: GrammarBuilder, tools: Sequence[Tool], parallel: bool) -> str:
    calls: list[str] = []
    for tool in tools:
        name = grammar.sequence(grammar.plain(tool.name), grammar.plain('">'))
        calls.append(grammar.sequence(name, *(_write_element(grammar, field) for field in fields(tool))))
    call = grammar.sequence(grammar.marked(_CALL), grammar.one_of(calls), grammar.marked(f"{_MARK}{_CALL_END}\n"))
    return grammar.sequence(grammar.marked(_BEGIN + "\n"), grammar.several(call, "", parallel), grammar.marked(_END))


def _write_element(grammar: GrammarBuilder, field: Field, depth: int = 0) -> str:
    """Returns the expression of an element, optional unless the field is required."""
    if not _NAME.fullmatch(field.name) or not field.name:
        raise ValueError(f"this model's call format does not allow the argument name {field.name!r}")
    begin, end = grammar.marked(f"{_MARK}<{field.name}>"), grammar.marked(f"{_MARK}</{field.name}>")
    if field.is_text:
        element = grammar.sequence(begin, grammar.text_until(_MARK), grammar.plain(f"</{field.name}>"))
    elif field.choices:
        element = grammar.sequence(begin, grammar.one_of([*map(json.dumps, field.choices)]), end)
    else:
        inside = _write_inside(grammar, field.schema, depth) if depth < _DEEPEST else None
        element = grammar.sequence(begin, grammar.json(field.schema) if inside is None else inside, end)
    return element if field.required else f"{element}?"


def _write_inside(grammar: GrammarBuilder, schema: JsonValue, depth: int) -> str | None:
    """Returns the expression of the elements of a plain object or array, or None for a schema written as JSON."""
    if not isinstance(schema, dict):
        return None
    properties, required, items = schema.get("properties"), schema.get("required", []), schema.get("items")
    if schema.get("type") == "object" and schema.keys() <= _PLAIN_OBJECT and isinstance(properties, dict):
        if not isinstance(required, list) or not set(map(str, required)) <= properties.keys():
            return None
        if not all(name and _NAME.fullmatch(name) for name in properties):
            return None
        inner = [Field(name, value, name in required) for name, value in properties.items() if value is not False]
        return grammar.sequence(*(_write_element(grammar, each, depth + 1) for each in inner), '""')
    if schema.get("type") == "array" and schema.keys() <= _PLAIN_ARRAY and isinstance(items, dict):
        return grammar.rule(f"{_write_element(grammar, Field(_ITEM, items, True), depth + 1)}*")
    return None


FORMATS = (
    OutputFormat(
        "minimax-m3",
        special=True,
        thinking=Thinking("<mm:think>", "</mm:think>"),
        begin=(_BEGIN, _CALL),
        stray=(_END, _MARK + _CALL_END),
        read_calls=_read,
        write_calls=_write,
    ),
)
