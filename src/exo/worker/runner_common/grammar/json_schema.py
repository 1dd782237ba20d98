"""Rewrites a JSON Schema to one that grammars can enforce.

Annotations are dropped. A keyword that restricts values is rewritten to keywords that grammars support, or refused by
name. ``uniqueItems``, overlapping ``oneOf``, unknown formats and a few more are not enforced, with a note for each.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations

from pydantic import JsonValue

from exo.worker.runner_common.grammar.schema_conditions import rewrite_conditions
from exo.worker.runner_common.grammar.schema_keywords import (
    BOUNDS,
    SHOWN,
    SchemaError,
    check_values,
    drop_idle,
    path_of,
    replace_unevaluated,
    rewrite_exclusive,
)
from exo.worker.runner_common.grammar.schema_overlap import Schema, disjoint, resolve, target_of, type_of
from exo.worker.runner_common.grammar.schema_pattern import without_look_ahead

FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
"""Formats that grammars enforce."""

# Keywords by what they hold: schemas by name, one schema, schemas in a list, or values.
_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_DEFINITIONS = ("$defs", "definitions")
# Keywords that concern the schema itself and not the values that match it.
_OF_PLACE = {*_DEFINITIONS, "$schema", "$id", "$anchor", "x-guidance"}
_EXCLUDING_NULL = {"type", "enum", "const", "$ref", "allOf", "anyOf", "oneOf"}
_OF_ONE = ("additionalProperties", "items", "additionalItems")
_OF_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_OF_VALUES = ("const", "enum", "default", "example", "examples")
_UNENFORCEABLE = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "propertyNames"),
    *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$recursiveRef"),
)
_NOTES = {"title", "description", "default", "example", "examples", "deprecated", "$comment", "readOnly", "writeOnly"}
_DRAFT = re.compile(r"https?://json-schema\.org/(draft-0[4-7])/schema#?")
_NEWER_DRAFT = re.compile(r"https?://json-schema\.org/draft/20(19-09|20-12)/schema#?")
_MOST_ARRANGED = 4
_MOST_SCHEMAS = 50_000
_LARGEST_BOUND = 1e18
LONGEST_SOURCE = 1 << 20
"""Characters of a grammar."""
WHITESPACE = r"[ \t\n]{0,20}"
"""White space between the parts of JSON, unless the schema defines it. If it were unlimited, some models would write
it without end."""


@dataclass(frozen=True, slots=True)
class SchemaNote:
    """A keyword that is not enforced. ``where`` is its path in the schema."""

    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Enforced:
    """A schema that grammars can enforce, with notes about keywords that are not enforced."""

    schema: JsonValue
    notes: tuple[SchemaNote, ...]


def enforced(schema: JsonValue) -> Enforced:
    """Rewrites ``schema`` to one that grammars can enforce. Raises ``SchemaError``."""
    rewriting = _Rewriting(schema)
    try:
        made = rewriting.schema(schema, "")
        rewriting.check_references()
    except RecursionError:
        raise SchemaError("", "it is nested too deeply") from None
    return Enforced(made, tuple(rewriting.notes))


def guided(schema: JsonValue) -> JsonValue:
    """Adds llguidance's options to an enforced schema."""
    if not isinstance(schema, dict):
        return schema
    given = schema.get("x-guidance", {})
    if not isinstance(given, dict):
        return schema
    spaced = given.keys() & {"whitespace_pattern", "whitespace_flexible"}
    spacing: Schema = {} if spaced else {"whitespace_pattern": WHITESPACE}
    return {**schema, "x-guidance": {"coerce_one_of": True, **spacing, **given}}


@dataclass
class _Rewriting:
    root: JsonValue
    notes: list[SchemaNote] = field(default_factory=list[SchemaNote])
    schemas: int = 0
    unenforceable: dict[int, SchemaError] = field(default_factory=dict[int, SchemaError])
    """The errors of definitions that cannot be enforced, by ``id()``."""

    def schema(self, value: JsonValue, where: str) -> JsonValue:
        if isinstance(value, bool):
            return value
        if not isinstance(value, dict):
            raise SchemaError(where, "a JSON Schema must be an object, true or false")
        self.schemas += 1
        if self.schemas > _MOST_SCHEMAS:
            raise SchemaError("", f"it has more than {_MOST_SCHEMAS} schemas in it")
        made = {key: each for key, each in value.items() if each is not None or key in _OF_VALUES}
        nullable = made.pop("nullable", False) is True
        if (negated := made.get("not")) is True or negated == {}:
            return False
        check_values(made, where)
        replace_unevaluated(made)
        drop_idle(made)
        rewrite_conditions(made)
        self._draft(made)
        self._annotations(made, where)
        self._pattern(made, where)
        self._one_of(made, where)
        self._property_names(made, where)
        self._bounds(made, where)
        rewrite_exclusive(made)
        for keyword in _UNENFORCEABLE:
            if keyword in made:
                raise SchemaError(path_of(where, keyword), "this keyword cannot be enforced here")
        self._inner(made, where)
        return _or_null(made) if nullable else made

    def check_references(self) -> None:
        """Raises ``SchemaError`` for a definition that is referred to and cannot be enforced."""
        waiting, seen = [self.root] if self.unenforceable else [], set[int]()
        while waiting:
            value = waiting.pop()
            if value is None or id(value) in seen:
                continue
            seen.add(id(value))
            if (error := self.unenforceable.get(id(value))) is not None:
                raise error
            if isinstance(value, dict):
                waiting += [*_parts(value), target_of(value.get("$ref"), self.root)]

    def _inner(self, made: Schema, where: str) -> None:
        for key in _OF_SCHEMAS:
            if isinstance(named := made.get(key), dict):
                step = self._definition if key in _DEFINITIONS else self.schema
                made[key] = {name: step(each, path_of(where, key, name)) for name, each in named.items()}
        for key in _OF_ONE:
            if key in made:
                made[key] = self.schema(made[key], path_of(where, key))
        for key in _OF_LISTS:
            if isinstance(listed := made.get(key), list):
                made[key] = [self.schema(each, path_of(where, key, str(index))) for index, each in enumerate(listed)]

    def _definition(self, value: JsonValue, where: str) -> JsonValue:
        """Rewrites a definition. ``check_references`` refuses one that cannot be enforced, but only if it is used."""
        before = len(self.notes)
        try:
            return self.schema(value, where)
        except SchemaError as error:
            del self.notes[before:]
            self.unenforceable[id(value)] = error
            return value

    def _note(self, where: str, text: str) -> None:
        self.notes.append(SchemaNote(where, text))

    def _draft(self, made: Schema) -> None:
        if "$schema" in made:
            named = str(made.pop("$schema"))
            if match := _DRAFT.fullmatch(named):
                made["$schema"] = f"http://json-schema.org/{match[1]}/schema#"
            elif _NEWER_DRAFT.fullmatch(named):
                made["$schema"] = named
        if "$dynamicAnchor" in made:
            made.setdefault("$anchor", made.pop("$dynamicAnchor"))
        made.pop("$recursiveAnchor", None)
        old = _DRAFT.fullmatch(str(self.root.get("$schema"))) if isinstance(self.root, dict) else None
        if isinstance(made.get("items"), list) and old is None:
            made["prefixItems"] = made.pop("items")
            if "additionalItems" in made:
                made["items"] = made.pop("additionalItems")

    def _annotations(self, made: Schema, where: str) -> None:
        if (name := made.get("format")) is not None and name not in FORMATS:
            del made["format"]
            self._note(path_of(where, "format"), f"{str(name)[:SHOWN]!r} is not enforced, since the format is unknown")
        if made.pop("uniqueItems", False) is not False and made.get("maxItems", 2) not in (0, 1):
            arrays = _arrangements(made, resolve(made.get("items"), self.root))
            if arrays is None:
                self._note(path_of(where, "uniqueItems"), "is not enforced")
            else:
                made["enum"] = arrays
        if "required" in made and not isinstance(made["required"], list):
            del made["required"]
            self._note(path_of(where, "required"), "is not enforced, since it is not a list of names")

    def _bounds(self, made: Schema, where: str) -> None:
        for key in BOUNDS:
            if isinstance(bound := made.get(key), int | float) and abs(bound) >= _LARGEST_BOUND:
                del made[key]
                self._note(path_of(where, key), f"is not enforced: grammars support bounds up to {_LARGEST_BOUND:g}")

    def _pattern(self, made: Schema, where: str) -> None:
        pattern = made.get("pattern")
        if pattern is None:
            return
        place = path_of(where, "pattern")
        if not isinstance(pattern, str):
            raise SchemaError(place, "must be a string")
        patterns = without_look_ahead(pattern)
        if patterns is None:
            if made.get("format") not in FORMATS:
                reason = f"{pattern[:SHOWN]!r} has look-around, a back-reference or a word boundary that"
                raise SchemaError(place, f"{reason} cannot be enforced")
            del made["pattern"]
            self._note(place, f"is not enforced, since it has look-around; the format {made['format']!r} is")
            return
        made["pattern"] = patterns[0]
        if more := patterns[1:]:
            both = made.get("allOf")
            made["allOf"] = [*(both if isinstance(both, list) else []), *({"pattern": each} for each in more)]

    def _one_of(self, made: Schema, where: str) -> None:
        choices = made.get("oneOf")
        if isinstance(choices, list) and not disjoint(choices, self.root):
            self._note(path_of(where, "oneOf"), "is enforced as anyOf, since a value may match several of its schemas")

    def _property_names(self, made: Schema, where: str) -> None:
        """Rewrites ``propertyNames`` to ``properties`` or ``patternProperties``, if they leave room for it."""
        if "propertyNames" not in made:
            return
        names = resolve(made["propertyNames"], self.root)
        if names is True:
            del made["propertyNames"]
        if not isinstance(names, dict) or names.get("type", "string") != "string":
            return
        names = {key: each for key, each in names.items() if key not in {*_NOTES, "type", "$schema"}}
        if (name := names.pop("format", None)) is not None:
            self._note(path_of(where, "propertyNames", "format"), f"{str(name)[:SHOWN]!r} is not enforced")
        if not names:
            del made["propertyNames"]
            return
        if made.get("patternProperties"):
            return
        given, other = made.get("properties", {}), made.get("additionalProperties", True)
        if not isinstance(given, dict):
            return
        allowed = _names(names)
        if allowed is not None:
            kept = {name: each for name, each in given.items() if name in allowed}
            made["properties"] = {**kept, **({name: other for name in allowed if name not in kept})}
        elif not given and (pattern := _names_pattern(names)) is not None:
            made["patternProperties"] = {pattern: other}
        else:
            return
        made["additionalProperties"] = False
        del made["propertyNames"]


def _parts(schema: Schema) -> Iterator[JsonValue]:
    """Yields the schemas in a schema, without its definitions."""
    for key in _OF_SCHEMAS:
        if key not in _DEFINITIONS and isinstance(named := schema.get(key), dict):
            yield from named.values()
    for key in (*_OF_ONE, *_OF_LISTS):
        one = schema.get(key)
        yield from one if isinstance(one, list) else [one]


def _or_null(made: Schema) -> Schema:
    """Returns a schema that also matches null. Keywords that others refer to stay in their place."""
    if not made.keys() & _EXCLUDING_NULL:
        return made
    outside = {key: each for key, each in made.items() if key in _OF_PLACE}
    inside = {key: each for key, each in made.items() if key not in _OF_PLACE}
    return {**outside, "anyOf": [inside, {"type": "null"}]}


def _names(names: Schema) -> list[str] | None:
    """Returns the property names that a schema lists, or None if it has other keywords."""
    listed = names.get("enum", [names["const"]] if "const" in names else None)
    if not isinstance(listed, list) or names.keys() - {"enum", "const"}:
        return None
    return [each for each in listed if isinstance(each, str) and names.get("const", each) == each]


def _names_pattern(names: Schema) -> str | None:
    """Returns a pattern of the property names that match a schema, or None if it cannot be written as one."""
    pattern, least, most = names.get("pattern"), names.get("minLength", 0), names.get("maxLength", "")
    if isinstance(pattern, str) and not names.keys() - {"pattern"}:
        only = without_look_ahead(pattern)
        return only[0] if only is not None and len(only) == 1 else None
    return None if names.keys() - {"minLength", "maxLength"} else rf"^[\s\S]{{{least},{most}}}$"


def _arrangements(made: Schema, items: JsonValue) -> list[JsonValue] | None:
    """Returns all arrays of distinct items, or None if there are too many."""
    if not isinstance(items, dict) or made.get("type") != "array" or made.keys() & {"prefixItems", "enum", "const"}:
        return None
    kind = items.get("type")
    values = [True, False] if kind == "boolean" and "enum" not in items else items.get("enum")
    if items.keys() - _NOTES - {"type", "enum"} or not isinstance(values, list) or len(values) > _MOST_ARRANGED:
        return None
    if kind is not None and not all(type_of(each) == kind for each in values):
        return None
    least, most = made.get("minItems", 0), made.get("maxItems", len(values))
    if not isinstance(least, int) or not isinstance(most, int):
        return None
    lengths = range(least, min(most, len(values)) + 1)
    return [list(each) for length in lengths for each in permutations(values, length)] or None
