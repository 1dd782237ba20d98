"""Request bodies: reading, unpacking and validating them, and what the models of all APIs have in common.

Values are not converted: a number in a string is not a number, and 1.0 is not an integer. An explicit null means the
default.
"""

import difflib
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import ClassVar, Self, TypeVar, cast

from anyio.to_thread import run_sync
from fastapi import Request
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from exo.api.http.errors import ApiError, from_validation
from exo.serving.pictures.limits import MOST_PICTURES
from exo.serving.pictures.prompt_pictures import GivenPicture, new_mark
from exo.serving.warnings import MAX_WARNINGS, refuses_unknown_fields, warn
from exo.worker.protocol.runners import RUNNERS, Need

Unsupported = Mapping[str, tuple[JsonValue, ...]]
"""Unsupported fields, and the values that request nothing, besides null."""
Note = tuple[str, str | None]
"""A field of a body without effect, and the reason; None if the field does not exist."""
MODEL = Field(
    default="",
    max_length=300,
    description="A model id or alias, optionally with @runner. Optional if only one model is loaded or known.",
)
MAX_ENTRIES = 1024
"""The maximum size of a table such as ``logit_bias``."""


def invalid(reason: str, param: str = "") -> PydanticCustomError:
    """``param`` is relative to the field at which the error is raised."""
    return PydanticCustomError("invalid_value", "{reason}", {"reason": reason, "param": param})


def missing(param: str) -> PydanticCustomError:
    """The error for a field that only some bodies need."""
    return PydanticCustomError("missing_parameter", "{reason}", {"reason": "this field is required", "param": param})


def unsupported(reason: str, param: str) -> PydanticCustomError:
    """The error for a field or value of other servers that is not supported here."""
    return PydanticCustomError("unsupported_parameter", "{reason}", {"reason": reason, "param": param})


@lru_cache(maxsize=1024)
def _suggestion(name: str, body: type[BaseModel]) -> str:
    near = difflib.get_close_matches(name, _names(body))
    return f"did you mean {' or '.join(near)}?" if near else ""


def _unknown(name: str, body: type[BaseModel]) -> PydanticCustomError:
    reason = "; ".join(filter(None, ("there is no such field", _suggestion(name, body))))
    return PydanticCustomError("unknown_parameter", "{reason}", {"reason": reason, "param": name})


def _no_effect(name: str, body: type[BaseModel]) -> str:
    suggestion = _suggestion(name, body)
    return f"there is no such field, so it has no effect{f' ({suggestion})' if suggestion else ''}"


def _same(left: JsonValue, right: JsonValue) -> bool:
    """Equality by which 0 differs from False and 1 from True, but 1 equals 1.0."""
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def honoured(need: Need) -> Callable[[dict[str, JsonValue]], None]:
    """A field's ``json_schema_extra``, which adds the runners with this feature to the description."""
    names = ", ".join(name for name, spec in RUNNERS.items() if need in spec.features)

    def tell(schema: dict[str, JsonValue]) -> None:
        schema["description"] = f"{schema['description']} Runners: {names}."

    return tell


def _tell_special_fields(schema: dict[str, JsonValue], body: type["RequestBody"]) -> None:
    for what, fields in (
        ("Accepted without effect", body.ignored),
        ("Refused unless they ask for nothing", body.unsupported),
    ):
        if fields:
            schema["description"] = f"{schema['description']} {what}: {', '.join(sorted(fields))}."


@cache
def _names(body: type[BaseModel]) -> frozenset[str]:
    """The clients' names of its fields."""
    return frozenset(field.alias or name for name, field in body.model_fields.items())


_notes: ContextVar[list[Note]] = ContextVar("notes")
"""Notes about the body whose fields are being validated."""
_pictures: ContextVar[dict[str, GivenPicture]] = ContextVar("pictures")
"""The pictures in that body, by their marks."""


class RequestBody(BaseModel):
    """The base of all request bodies.

    Unknown fields are left out with a warning, or refused where the server is strict.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra=_tell_special_fields,
        defer_build=True,  # until the first request of its kind: an eighth of a server's start is building them all
    )
    unsupported: ClassVar[Unsupported] = {}
    ignored: ClassVar[Unsupported] = {}
    """Fields that no answer depends on. They cause a warning, except with these values."""
    refuses_unknown: ClassVar[bool] = False
    """Whether unknown fields are always refused, because a partial request would do harm."""
    _own_notes: list[Note] = PrivateAttr(default_factory=list[Note])
    _own_pictures: dict[str, GivenPicture] = PrivateAttr(default_factory=dict[str, GivenPicture])

    @classmethod
    def why_unsupported(cls, name: str) -> str:
        """The reason for refusing the field ``name`` of ``unsupported``."""
        return "not supported by any runner of this server"

    def note(self, param: str, text: str) -> None:
        """Adds a warning about the field ``param``. Validators of the whole body call this."""
        self._own_notes.append((param, text))

    @model_validator(mode="wrap")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        known = _names(cls)
        kept: dict[str, JsonValue] = {}
        notes: list[Note] = []
        for name, value in cast(dict[str, JsonValue], data).items():
            if name in known:
                if value is not None:
                    kept[name] = value
            elif (neutral := cls.unsupported.get(name)) is not None:
                if value is not None and not any(_same(value, each) for each in neutral):
                    raise unsupported(cls.why_unsupported(name), name)
            elif (neutral := cls.ignored.get(name)) is not None:
                if value is not None and not any(_same(value, each) for each in neutral):
                    notes.append((name, "has no effect here"))
            elif cls.refuses_unknown or refuses_unknown_fields():
                raise _unknown(name[:64], cls)
            else:
                notes.append((name[:64], None))
        pictures: dict[str, GivenPicture] = {}
        token, other = _notes.set(notes), _pictures.set(pictures)
        try:
            body = handler(kept)
        finally:
            _notes.reset(token)
            _pictures.reset(other)
        body._own_notes.extend(notes)
        body._own_pictures.update(pictures)
        return body

    @property
    def pictures(self) -> Mapping[str, GivenPicture]:
        """The pictures in the body, by the marks in its texts that stand for them."""
        return self._own_pictures

    def notes(self, path: str = "") -> Iterator[tuple[str, str]]:
        """The fields without effect in this body and its parts, each with the reason. ``path`` is the body's own."""
        for param, text in self._own_notes:
            yield ".".join(filter(None, (path, param))), _no_effect(param, type(self)) if text is None else text
        for name, value in self.__dict__.items():
            bodies = cast(list[object], value) if isinstance(value, list) else [value]
            if bodies and isinstance(bodies[0], RequestBody):
                field = type(self).model_fields[name]
                inside = ".".join(filter(None, (path, field.alias or name)))
                for body in bodies:
                    if isinstance(body, RequestBody):
                        yield from body.notes(inside)


def note(param: str, text: str) -> None:
    """Adds a warning about ``param`` of the enclosing body. Validators of one field call this."""
    _notes.get().append((param, text))


def add_picture(picture: GivenPicture) -> str:
    """Adds a picture to the enclosing body. Returns the mark that stands for it. Validators of one field call this."""
    pictures = _pictures.get()
    if len(pictures) == MOST_PICTURES:
        raise invalid(f"at most {MOST_PICTURES} pictures are accepted")
    mark = new_mark()
    pictures[mark] = picture
    return mark


def warn_of_notes(body: RequestBody) -> None:
    """Warns of the fields in ``body`` without effect, up to a bound."""
    told: dict[str, str] = {}
    for param, text in body.notes():
        told.setdefault(param, text)
        if len(told) > MAX_WARNINGS:
            break
    for param, text in told.items():
        warn(param, text)


def few(value: JsonValue) -> JsonValue:
    """Bounds a table before its entries are validated, because each entry may cause an error."""
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise invalid(f"at most {MAX_ENTRIES} entries are accepted (got {len(value)})")
    return value


BODY_LIMIT = 16 << 20
"""Bytes, both as sent and unpacked."""
WEIGHT_LIMIT = 2 << 20
"""The maximum of ``_weight``. Validation then blocks the event loop for less than a second."""
_LARGE = 128 << 10
"""A larger body is validated in a thread."""
_SLICE = 64 << 10
_UNPACKED = 256 << 10
"""Bytes to unpack at once."""
_IRRELEVANT = bytes(set(range(256)) - set(b'",:[{'))
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, model: type[Body]) -> Body:
    """The request's JSON body as ``model``. Raises ``ApiError`` 400, 413 or 415."""
    _check_type(request)
    encoding = _encoding(request)
    body = await _read(request)
    if encoding is None and len(body) <= _LARGE:
        return _validate(body, model)

    def work() -> Body:
        content = body if encoding is None else _unpack(body, encoding)
        if _weight(content) > WEIGHT_LIMIT:
            raise ApiError(413, "the body holds too many JSON values", code="request_too_large")
        return _validate(content, model)

    return await run_sync(work)


def _check_type(request: Request) -> None:
    """Accepts JSON, and from clients other than browsers also a body without a stated type.

    A web page may send some other types across origins without asking first, and then a form of no browser's has to be
    refused as well, since old browsers do not say who they are.
    """
    given = request.headers.get("content-type")
    media_type = (given or "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        return
    in_browser = "origin" in request.headers or "sec-fetch-site" in request.headers
    if not in_browser and (given is None or media_type == "application/octet-stream"):
        return
    found = f"got {media_type[:80]!r}" if media_type else "got none"
    raise ApiError(415, f"content-type must be application/json ({found})", code="unsupported_media_type")


def _encoding(request: Request) -> str | None:
    """``gzip`` or ``deflate``; None for a plain body."""
    given = ",".join(request.headers.getlist("content-encoding")).lower().split(",")
    match [name for each in given if (name := each.strip().removeprefix("x-")) not in ("", "identity")]:
        case []:
            return None
        case ["gzip" | "deflate" as only]:
            return only
        case names:
            message = f"content-encoding: accepted are identity, gzip and deflate (got {', '.join(names)[:80]!r})"
            headers = {"accept-encoding": "gzip, deflate", "connection": "close"}
            raise ApiError(415, message, code="unsupported_media_type", headers=headers)


async def _read(request: Request) -> bytearray:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            raise _too_large()
    return body


def _unpack(body: bytearray, encoding: str) -> bytearray:
    """``deflate`` is zlib's format (RFC 9110), but some clients send it without zlib's header."""
    with_header = len(body) > 1 and body[0] & 15 == zlib.DEFLATED and int.from_bytes(body[:2]) % 31 == 0
    unpacking = zlib.decompressobj(_GZIP if encoding == "gzip" else _ZLIB if with_header else _RAW)
    content, rest = bytearray(), bytes(body)
    with suppress(zlib.error):
        while not unpacking.eof and len(content) <= BODY_LIMIT:
            piece = unpacking.decompress(rest, _UNPACKED)
            content += piece
            rest = unpacking.unconsumed_tail
            if not (piece or rest):
                break
    if len(content) > BODY_LIMIT:
        raise _too_large()
    if not unpacking.eof or unpacking.unused_data:
        raise ApiError(400, f"content-encoding: the body is not one whole {encoding} stream", code="invalid_encoding")
    return content


def _weight(body: bytearray) -> int:
    """Estimates the cost of validating a JSON document: 1 for each array element, 8 more for each key and container.

    Counts marks outside of strings, in slices between which the event loop can run. Ends at the limit.
    """
    marks = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _IRRELEVANT)
    weight = in_string = 0
    for start in range(0, len(marks), _SLICE):
        parts = marks[start : start + _SLICE].split(b'"')
        outside = b"".join(parts[in_string::2])
        weight += outside.count(b",") + 8 * (len(outside) - outside.count(b","))
        in_string = (in_string + len(parts) - 1) % 2
        if weight > WEIGHT_LIMIT:
            break
    return weight


def _validate(body: bytearray, model: type[Body]) -> Body:
    try:
        parsed = model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None
    if isinstance(parsed, RequestBody):
        warn_of_notes(parsed)
    return parsed


def _too_large() -> ApiError:
    # The rest of the body is not read, which ends the connection.
    return ApiError(
        413, f"the body is larger than {BODY_LIMIT} bytes", code="request_too_large", headers={"connection": "close"}
    )
