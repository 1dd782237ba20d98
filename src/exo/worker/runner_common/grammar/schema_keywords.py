"""The keywords of one schema: checks of their values, and rewrites that need no other schema."""

import json
import math
from collections.abc import Callable, Mapping
from typing import cast

from pydantic import JsonValue

from exo.worker.runner_common.grammar.schema_overlap import Schema

TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# Keywords with schemas that see the same value, so that what they evaluate is not "unevaluated" next to them.
_EVALUATING = {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "contains", "dependentSchemas", "$dynamicRef"}
_STEP = 1e-6
SHOWN = 100


class SchemaError(Exception):
    """A schema cannot be enforced. The message begins with ``where``, the path of the keyword at fault."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(": ".join(filter(None, (where, reason))))
        self.where = where
        self.reason = reason


def path_of(*parts: str) -> str:
    """The path of a keyword."""
    return ".".join(filter(None, parts))


def check_values(made: Schema, where: str) -> None:
    """Raises ``SchemaError`` for a keyword with an invalid value. Converts whole numbers to integers."""
    kinds = made.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in TYPES:
            reason = f"{str(kind)[:SHOWN]!r} is not a type; accepted are {', '.join(TYPES)}"
            raise SchemaError(path_of(where, "type"), reason)
    for key in _COUNTS:
        number = made.get(key, 0)
        if not _is_count(number):
            raise SchemaError(
                path_of(where, key), f"must be a whole number, 0 or more (got {json.dumps(number)[:SHOWN]})"
            )
        if key in made:
            made[key] = int(cast(float, number))
    for key in BOUNDS:
        if not isinstance(made.get(key, 1), int | float):
            raise SchemaError(path_of(where, key), f"must be a number (got {json.dumps(made[key])[:SHOWN]})")
    if (factor := made.get("multipleOf", 1)) is True or not isinstance(factor, int | float) or factor <= 0:
        raise SchemaError(path_of(where, "multipleOf"), f"must be above 0 (got {json.dumps(factor)[:SHOWN]})")
    for key in ("anyOf", "oneOf", "enum"):
        if made.get(key) == []:
            raise SchemaError(path_of(where, key), "is empty, so nothing matches it")


def _is_count(number: JsonValue) -> bool:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        return False
    return number >= 0 and number == int(number)


def drop_idle(made: Schema) -> None:
    """Drops keywords with values that restrict nothing."""
    idle: Mapping[str, Callable[[JsonValue], bool]] = {
        "not": lambda value: value is False or value == {"not": {}},
        "dependencies": lambda value: value == {},
        "dependentRequired": lambda value: isinstance(value, dict) and not any(value.values()),
        "dependentSchemas": lambda value: value == {},
        "unevaluatedProperties": lambda value: value is True or value == {},
        "unevaluatedItems": lambda value: value is True or value == {},
        "contains": lambda _: made.get("minContains") == 0 and "maxContains" not in made,
    }
    for key, restricts_nothing in idle.items():
        if key in made and restricts_nothing(made[key]):
            del made[key]
    if "if" not in made or not made.keys() & {"then", "else"}:
        for key in ("if", "then", "else"):
            made.pop(key, None)
    if "contains" not in made:
        for key in ("minContains", "maxContains"):
            made.pop(key, None)


def replace_unevaluated(made: Schema) -> None:
    """Rewrites "unevaluated" keywords to "additional" ones. They are the same unless other schemas see the value."""
    if made.keys() & _EVALUATING:
        return
    for unevaluated, additional in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if unevaluated in made:
            made.setdefault(additional, made.pop(unevaluated))
            made.pop(unevaluated, None)


def rewrite_exclusive(made: Schema) -> None:
    """Rewrites draft 4's flags to bounds, and moves some exclusive bounds by a small step.

    llguidance lets {"exclusiveMinimum": 3, "maximum": 3.5} allow 3.
    """
    for excluded, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(flag := made.get(excluded), bool):
            del made[excluded]
            if flag and bound in made:
                made[excluded] = made.pop(bound)
    for excluded, limits, end in (
        ("exclusiveMinimum", ("maximum", "exclusiveMaximum"), math.inf),
        ("exclusiveMaximum", ("minimum", "exclusiveMinimum"), -math.inf),
    ):
        bound = _numeric(made.get(excluded))
        other = _numeric(next((made[limit] for limit in limits if limit in made), None))
        if bound is not None and other is not None and bound == round(bound) and 0 < abs(other - bound) < 1:
            step = bound + (other - bound) * _STEP
            made[excluded] = step if step != bound else math.nextafter(bound, end)


def _numeric(value: JsonValue) -> float | None:
    """Returns a number that floats can tell from its neighbours less than 1 away, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1 << 53 else None
