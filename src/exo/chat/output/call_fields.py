"""Arguments that are written one by one, each as bare text or as JSON, and not as one JSON object.

Several formats write a text as it stands and everything else as JSON, so that only the tool's schema tells the text
"7" from the number. A reader and a grammar that agree on which is which are here.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from pydantic import JsonValue

from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.argument_schema import Strings, argument_schema, strings
from exo.chat.output.json_scanner import loose_json
from exo.chat.output.python_literal import loose_value

_NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"}
_DEFINITIONS = ("$defs", "definitions")
_OBJECT = {"type", "properties", "required", "additionalProperties", *_DEFINITIONS, *_NOTES}
_LOOSE_BEGINS = ("{", "[", "(")
_PYTHON = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True, slots=True)
class Field:
    """One argument. ``schema`` can be read by itself: it has the definitions that it may refer to."""

    name: str
    schema: JsonValue
    required: bool
    parameters: Mapping[str, JsonValue] = dataclasses.field(default_factory=dict[str, JsonValue])
    """The schema of all arguments, which references may point into."""

    @property
    def is_text(self) -> bool:
        """Whether every text is a right value. Then it is written as it stands, and nothing else is."""
        return strings(self.schema, self.parameters).every

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts to choose from, if that is all there is to the schema."""
        return _choices(self.schema)


def fields(tool: Tool) -> list[Field]:
    """The tool's arguments in the order of its schema.

    Raises ``ValueError`` where arguments that each follow the schema of their own could still be wrong together.
    """
    schema = tool.parameters
    if other := sorted(schema.keys() - _OBJECT):
        raise ValueError(
            f"this model's call format cannot be held to {other[0]!r} at the top of the schema of {tool.name!r}"
        )
    required = schema.get("required") or []
    properties = schema.get("properties") or {}
    if not isinstance(required, list) or not isinstance(properties, dict):
        raise ValueError(f"the schema of {tool.name!r} is none: properties must be an object and required an array")
    rest: dict[str, JsonValue] = {str(name): {} for name in required if name not in properties}
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    return [
        Field(name, {**definitions, **value} if isinstance(value, dict) else value, name in required, schema)
        for name, value in {**properties, **rest}.items()
        if value is not False
    ]


def is_text(parameters: Mapping[str, JsonValue], name: str) -> bool:
    """Whether argument ``name`` of a tool with these ``parameters`` is text, whatever it looks like."""
    schema = argument_schema(parameters, name)
    return schema is not None and strings(schema, parameters).every


def written_as_json(parameters: Mapping[str, JsonValue], name: str) -> bool:
    """Whether argument ``name`` of a tool with these ``parameters`` is known to be written as JSON."""
    schema = argument_schema(parameters, name)
    if schema is None:
        return False
    accepted = strings(schema, parameters)
    return not accepted.every and not accepted.texts


def to_json(text: str, parameters: Mapping[str, JsonValue], name: str) -> str:
    """The JSON of the value that ``text`` stands for, as argument ``name`` of a tool with these ``parameters``.

    It is a string wherever the schema accepts that string. Where a rule such as a pattern leaves some strings out, a
    grammar has the model write JSON, and so a string in quotes is what is in them. Objects and arrays that are nearly
    JSON count where the schema accepts no string. Words without quotes in them are strings only if there is a schema:
    otherwise "[optional]" is more likely a text than an array.
    """
    schema = argument_schema(parameters, name)
    accepted = Strings(frozenset()) if schema is None else strings(schema, parameters)
    if accepted.every:
        return _quoted(text)
    if accepted.texts is not None and (choice := text if text in accepted.texts else text.strip()) in accepted.texts:
        return _quoted(choice)
    word = text.strip()
    word = _PYTHON.get(word, word)
    try:
        value = json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        no_text = schema is None or accepted == Strings(frozenset())
        if not no_text or word[:1] not in _LOOSE_BEGINS:
            return _quoted(text)
        return (loose_json if schema is None else loose_value)(word) or _quoted(text)
    only_text = accepted.ruled or (isinstance(schema, dict) and schema.get("type") == "string") or _choices(schema)
    return _quoted(text) if only_text and not isinstance(value, str) else word


def typed_to_json(text: str, is_text: bool, parameters: Mapping[str, JsonValue], name: str) -> str:
    """The same where the model tells whether the value is a text. The schema decides where it rules that out."""
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
