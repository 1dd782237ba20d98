"""Request bodies: bounded while they are read, then unpacked and validated."""

import zlib
from contextlib import suppress
from typing import TypeVar

from anyio.to_thread import run_sync
from fastapi import Request
from pydantic import BaseModel, ValidationError

from exo.api.http.errors import ApiError, from_validation
from exo.api.http.strict_model import RequestBody, warn_of_notes

BODY_LIMIT = 16 << 20
"""Bytes, as sent and unpacked."""
WEIGHT_LIMIT = 2 << 20
"""The most that a body may weigh, see ``_weight``. Validation blocks the event loop for less than a second then."""
_LARGE = 128 << 10
"""Bytes of a body that is not validated on the event loop."""
_SLICE = 64 << 10
_UNPACKED = 256 << 10
"""Bytes that are unpacked at once."""
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
    """JSON, or from a client that is no browser also a body of unstated type.

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
    """``gzip`` or ``deflate``; None for a body that is sent as it is."""
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
    """About what it costs to validate a JSON document: 1 for each element of an array, 8 more for a key or a container.

    Counts what is outside of strings, slice by slice, so that the event loop can run in between. Ends at the limit.
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
        413,
        f"the body is larger than {BODY_LIMIT} bytes",
        code="request_too_large",
        headers={"connection": "close"},
    )
