"""Request bodies: bounded while they are read, then validated."""

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from exo.api.errors import ApiError, from_validation
from exo.api.fields import RequestBody, warn_of_notes

BODY_LIMIT = 16 << 20
"""Bytes."""

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, model: type[Body]) -> Body:
    """The request's JSON body as ``model``. Raises ``ApiError`` 400, 413 or 415.

    Any other content type is refused because a web page may send it across origins without asking first.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        found = f"got {media_type[:80]!r}" if media_type else "got none"
        raise ApiError(415, f"content-type must be application/json ({found})", code="unsupported_media_type")
    if encoding := request.headers.get("content-encoding"):
        raise ApiError(415, f"content-encoding {encoding[:80]!r} is not accepted", code="unsupported_media_type")
    body = await _read(request)
    try:
        parsed = model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None
    if isinstance(parsed, RequestBody):
        warn_of_notes(parsed)
    return parsed


async def _read(request: Request) -> bytearray:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            raise ApiError(
                413,
                f"the body is larger than {BODY_LIMIT} bytes",
                code="request_too_large",
                headers={"connection": "close"},  # the rest of the body is not read
            )
    return body
