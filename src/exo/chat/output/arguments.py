"""Arguments written one by one, each as bare text or as JSON, and not as one JSON object.

Several formats write a text as it is and everything else as JSON, so that only the tool's schema distinguishes the text
"7" from the number. If the schema accepts the text as a string, it is one. This reading of schemas is lenient: it
decides how to read an argument, and validates nothing. Parsers and grammars share it, so that they agree.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from pydantic import JsonValue

from exo.chat.grammar.builder import GrammarBuilder
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.json_scanner import loose_json
from exo.chat.output.python_literal import loose_value
from exo.worker.runner_common.grammar.schema_overlap import target_of

_NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"}
_DEFINITIONS = ("$defs", "definitions")
_OBJECT = {"type", "properties", "required", "additionalProperties", *_DEFINITIONS, *_NOTES}
_LOOSE_BEGINS = ("{", "[", "(")
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_MOST_SUBSCHEMAS = 200
# Keywords that do not concern strings. A schema without a type that has one of them does not mean a string.
_OTHER_TYPES = {
    *("properties", "required", "additionalProperties", "patternProperties"),
    *("items", "prefixItems", "minItems", "maxItems"),
    *("minimum", "maximum", "multipleOf"),
}
_RULES = {"pattern", "format", "minLength", "maxLength", "not", "if"}


@dataclass(frozen=True, slots=True)
class Field:
    """An argument of a tool."""

    name: str
    schema: JsonValue
    """The argument's schema, with the definitions that it may refer to."""
    required: bool
    parameters: Mapping[str, JsonValue] = dataclasses.field(default_factory=dict[str, JsonValue])
    """The schema of all arguments, which references may point into."""

    @property
    def is_text(self) -> bool:
        """Whether the schema accepts every text. Such an argument is always written as bare text."""
        return strings(self.schema, self.parameters).every

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts of an enum, if the schema has no other restriction."""
        return _choices(self.schema)

    def written(self, grammar: GrammarBuilder, end: str, before_end: str = "") -> str:
        """Returns the expression of a value and the marker ``end``. ``before_end`` follows a value that is not text."""
        if self.is_text:
            return grammar.text_until(end)
        value = grammar.one_of([*map(json.dumps, self.choices)]) if self.choices else grammar.json(self.schema)
        return grammar.sequence(value, grammar.marked(before_end + end))


def fields(tool: Tool) -> list[Field]:
    """Returns the tool's arguments in the order of its schema.

    Raises ``ValueError`` if the schema restricts more than the arguments one by one.
    """
    schema = tool.parameters
    if other := sorted(schema.keys() - _OBJECT):
        where = f"{other[0]!r} at the top of the schema of {tool.name!r}"
        raise ValueError(f"this model's call format cannot enforce {where}")
    required = schema.get("required") or []
    properties = schema.get("properties") or {}
    if not isinstance(required, list) or not isinstance(properties, dict):
        raise ValueError(f"the schema of {tool.name!r} is invalid: properties must be an object and required an array")
    rest: dict[str, JsonValue] = {str(name): {} for name in required if name not in properties}
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    return [
        Field(name, {**definitions, **value} if isinstance(value, dict) else value, name in required, schema)
        for name, value in {**properties, **rest}.items()
        if value is not False
    ]


@dataclass(frozen=True, slots=True)
class Strings:
    """The strings that a schema accepts: ``texts`` if given, else all but those that rules exclude if ``ruled``."""

    texts: frozenset[str] | None = None
    ruled: bool = False

    @property
    def every(self) -> bool:
        """Whether every string is accepted."""
        return self.texts is None and not self.ruled

    def __or__(self, other: "Strings") -> "Strings":
        if self.every or other.every:
            return Strings()
        if self.texts is None or other.texts is None:
            return Strings(ruled=True)
        return Strings(self.texts | other.texts)

    def __and__(self, other: "Strings") -> "Strings":
        if self.texts is None or other.texts is None:
            texts = other.texts if self.texts is None else self.texts
            return Strings(texts, texts is None and (self.ruled or other.ruled))
        return Strings(self.texts & other.texts)


_NONE = Strings(frozenset())


def strings(schema: JsonValue, root: Mapping[str, JsonValue]) -> Strings:
    """Returns the strings that ``schema`` accepts. Its references point into the document ``root``."""
    return _SchemaWalk(root).strings(schema)


def argument_schema(parameters: Mapping[str, JsonValue], name: str) -> JsonValue:
    """Returns the schema of argument ``name`` of a tool with these ``parameters``, or None if there is none."""
    found: list[JsonValue] = []
    others: list[JsonValue] = []
    for schema in _SchemaWalk(parameters).alternatives():
        properties = schema.get("properties")
        if isinstance(properties, dict) and name in properties:
            found.append(properties[name])
        elif isinstance(other := schema.get("additionalProperties"), dict):
            others.append(other)
    schemas = found or others
    return {"anyOf": schemas} if len(schemas) > 1 else schemas[0] if schemas else None


def argument_names(parameters: Mapping[str, JsonValue]) -> frozenset[str] | None:
    """Returns the arguments of a tool with these ``parameters``, or None if it may have any."""
    names: set[str] = set()
    for schema in _SchemaWalk(parameters).alternatives():
        properties = schema.get("properties")
        if isinstance(properties, dict):
            names |= properties.keys()
        if schema.get("additionalProperties") or schema.get("patternProperties"):
            return None
    return frozenset(names) or None


def argument_strings(parameters: Mapping[str, JsonValue], name: str) -> Strings | None:
    """Returns the strings that argument ``name`` accepts, or None if there is no schema of it."""
    schema = argument_schema(parameters, name)
    return None if schema is None else strings(schema, parameters)


def to_json(text: str, parameters: Mapping[str, JsonValue], name: str) -> str:
    """Returns as JSON the value of argument ``name`` of a tool with these ``parameters`` that was written as ``text``.

    The value is a string if the schema accepts that string. If a rule such as a pattern excludes some strings, a
    grammar makes the model write JSON, so that quotes are removed. Objects and arrays in nearly valid JSON count if the
    schema accepts no string. Unquoted words in them are strings only if there is a schema: without one, "[optional]" is
    more likely a text than an array.
    """
    schema = argument_schema(parameters, name)
    accepted = _NONE if schema is None else strings(schema, parameters)
    if accepted.every:
        return _quoted(text)
    if accepted.texts is not None and (choice := text if text in accepted.texts else text.strip()) in accepted.texts:
        return _quoted(choice)
    word = text.strip()
    word = _PYTHON.get(word, word)
    try:
        value = json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        no_text = schema is None or accepted == _NONE
        if not no_text or word[:1] not in _LOOSE_BEGINS:
            return _quoted(text)
        return (loose_json if schema is None else loose_value)(word) or _quoted(text)
    only_text = accepted.ruled or (isinstance(schema, dict) and schema.get("type") == "string") or _choices(schema)
    return _quoted(text) if only_text and not isinstance(value, str) else word


def typed_to_json(text: str, is_text: bool, parameters: Mapping[str, JsonValue], name: str) -> str:
    """Like ``to_json``, for formats in which the model marks texts. The schema decides where it excludes the mark."""
    schema = argument_schema(parameters, name)
    if is_text:
        return _quoted(text) if schema is None else to_json(text, parameters, name)
    only_text = isinstance(schema, dict) and schema.get("type") == "string"
    return to_json(text, parameters if only_text else {}, name)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _choices(schema: JsonValue) -> tuple[str, ...]:
    if not isinstance(schema, dict) or not schema.keys() <= {"type", "enum", *_NOTES, *_DEFINITIONS}:
        return ()
    choices = schema.get("enum")
    if schema.get("type", "string") != "string" or not isinstance(choices, list):
        return ()
    texts = tuple(
        choice for choice in choices if isinstance(choice, str) and choice == choice.strip() and "<" not in choice
    )
    return texts if len(texts) == len(choices) else ()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


class _SchemaWalk:
    """One walk through a schema, bounded even if its references are circular."""

    def __init__(self, root: Mapping[str, JsonValue]) -> None:
        self._root = root
        self._left = _MOST_SUBSCHEMAS
        self._references: set[str] = set()

    def strings(self, schema: JsonValue) -> Strings:
        if schema is False:
            return _NONE
        if not isinstance(schema, dict):
            return Strings()
        self._left -= 1
        if self._left < 0:
            return Strings(ruled=True)
        found = Strings(ruled=not _RULES.isdisjoint(schema))
        kind = schema.get("type")
        kinds = kind if isinstance(kind, list) else [kind]
        if "string" not in kinds and (kind is not None or not _OTHER_TYPES.isdisjoint(schema)):
            return _NONE
        if isinstance(choices := schema.get("enum"), list):
            found &= Strings(frozenset(choice for choice in choices if isinstance(choice, str)))
        if "const" in schema:
            constant = schema["const"]
            found &= Strings(frozenset([constant])) if isinstance(constant, str) else _NONE
        if isinstance(reference := schema.get("$ref"), str):
            found &= self._referred(reference)
        for each in _listed(schema, "allOf"):
            found &= self.strings(each)
        for keyword in ("anyOf", "oneOf"):
            if choices := _listed(schema, keyword):
                union = _NONE
                for each in choices:
                    union |= self.strings(each)
                found &= union
        return found

    def alternatives(self) -> Iterator[Mapping[str, JsonValue]]:
        """Yields the schema and its subschemas for the same object, each of which may describe some properties."""
        waiting: list[JsonValue] = [dict(self._root)]
        while waiting and self._left > 0:
            self._left -= 1
            each = waiting.pop()
            if isinstance(each, dict):
                yield each
                for keyword in ("allOf", "anyOf", "oneOf"):
                    waiting += _listed(each, keyword)
                if isinstance(reference := each.get("$ref"), str):
                    waiting.append(self._resolved(reference))

    def _referred(self, reference: str) -> Strings:
        """Returns the strings of a reference's target. A circular reference accepts none."""
        if reference in self._references:
            return _NONE
        self._references.add(reference)
        found = self.strings(self._resolved(reference))
        self._references.remove(reference)
        return found

    def _resolved(self, reference: str) -> JsonValue:
        """Returns a reference's target. For another document, returns a schema of which nothing is certain."""
        root = dict(self._root)
        target = root if reference == "#" else target_of(reference, root)
        return {"not": False} if target is None else target


def _listed(schema: Mapping[str, JsonValue], keyword: str) -> list[JsonValue]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []
