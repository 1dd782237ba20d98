"""What the request bodies of every dialect have in common.

Numbers are numbers and flags are flags: nothing is read out of strings, and 1.0 is no integer. An explicit null means
the default.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import ClassVar, cast

from pydantic import BaseModel, ConfigDict, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from exo.worker.runners import RUNNERS, Need

Unsupported = Mapping[str, tuple[JsonValue, ...]]
"""Fields that nothing here can honour, with the values that ask for nothing, besides null."""
MAX_ENTRIES = 1024
"""Of a table, such as ``logit_bias``."""


def invalid(reason: str, param: str = "") -> PydanticCustomError:
    """``param`` is relative to the field at which the error is raised."""
    return PydanticCustomError("invalid_value", "{reason}", {"reason": reason, "param": param})


def missing(param: str) -> PydanticCustomError:
    """For a field that only some bodies need."""
    return PydanticCustomError("missing_parameter", "{reason}", {"reason": "this field is required", "param": param})


def unsupported(reason: str, param: str) -> PydanticCustomError:
    """For what is known elsewhere and cannot be honoured here."""
    return PydanticCustomError("unsupported_parameter", "{reason}", {"reason": reason, "param": param})


def _unknown(name: str, known: Iterable[str]) -> PydanticCustomError:
    near = difflib.get_close_matches(name[:64], known)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return PydanticCustomError(
        "unknown_parameter", "{reason}", {"reason": f"there is no such field{hint}", "param": name[:64]}
    )


def _same(left: JsonValue, right: JsonValue) -> bool:
    """Equality that keeps 0 from False and 1 from True."""
    return type(left) is type(right) and left == right


def honoured(need: Need) -> Callable[[dict[str, JsonValue]], None]:
    """For a field's ``json_schema_extra``: its description also says which runners can do what it needs."""
    names = ", ".join(name for name, spec in RUNNERS.items() if need in spec.features)

    def tell(schema: dict[str, JsonValue]) -> None:
        schema["description"] = f"{schema['description']} Runners: {names}."

    return tell


def _tell_refused(schema: dict[str, JsonValue], body: type["RequestBody"]) -> None:
    if body.unsupported:
        names = ", ".join(sorted(body.unsupported))
        schema["description"] = f"{schema['description']} Refused unless they ask for nothing: {names}."


@cache
def _names(body: type[BaseModel]) -> frozenset[str]:
    """What clients call its fields."""
    return frozenset(field.alias or name for name, field in body.model_fields.items())


class RequestBody(BaseModel):
    """What all request bodies have in common."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_tell_refused
    )
    unsupported: ClassVar[Unsupported] = {}

    @classmethod
    def why_unsupported(cls, name: str) -> str:
        """Why the field ``name`` of ``unsupported`` is refused."""
        return "not supported by any runner of this server"

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        known = _names(cls)
        kept: dict[str, JsonValue] = {}
        for name, value in cast(dict[str, JsonValue], data).items():
            if name in known:
                if value is not None:
                    kept[name] = value
            elif name not in cls.unsupported:
                raise _unknown(name, known)
            elif value is not None and not any(_same(value, neutral) for neutral in cls.unsupported[name]):
                raise unsupported(cls.why_unsupported(name), name)
        return kept


def few(value: JsonValue) -> JsonValue:
    """Bounds a table before its entries are looked at, each of which may be a fault of its own."""
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise invalid(f"at most {MAX_ENTRIES} entries are accepted (got {len(value)})")
    return value
