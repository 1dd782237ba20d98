"""Replies with an error, also to what the application does not handle itself."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import cast
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from exo.api.http.errors import INTERNAL_ERROR, PROTECTION, ErrorBody, error_body
from exo.serving.activity import Dialect, current_record
from exo.serving.errors import ServingError

log = logging.getLogger(__name__)


def error_reply(error: ErrorBody, headers: Mapping[str, str] | None = None) -> Response:
    """The reply to the current request, whose record gets the error. ``headers`` are added to the error's own."""
    record = current_record()
    record.error = error.code
    own = dict(error.headers)
    if record.dialect == "anthropic":
        own["request-id"] = f"req_{uuid4().hex}"
    if error.status >= 500 and "retry-after" not in own:
        own["x-should-retry"] = "false"  # OpenAI's clients otherwise retry, and would load a broken model again
    return Response(
        in_envelope(error, record.dialect),
        status_code=error.status,
        headers={**PROTECTION, **own, **(headers or {})},
        media_type="application/json",
    )


def in_envelope(error: ErrorBody, dialect: Dialect) -> bytes:
    """The error in the envelope of an API."""
    if dialect == "anthropic":
        return error.anthropic()
    return error.ollama() if dialect == "ollama" else error.openai()


async def _serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_reply(error_body(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    known = {
        404: ErrorBody(status=404, message=f"there is no {where}; /docs lists what there is", code="not_found"),
        405: ErrorBody(status=405, message=f"{where}: this method is not allowed here", code="method_not_allowed"),
    }
    body = known.get(error.status_code) or ErrorBody(
        status=error.status_code, message=str(error.detail), code="http_error"
    )
    return error_reply(replace(body, headers=error.headers or {}))


async def _query_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: Mapping[str, object] = error.errors()[0]
    param = str(cast(tuple[object, ...], first["loc"])[-1])
    code = "missing_parameter" if first["type"] == "missing" else "invalid_value"
    body = ErrorBody(status=400, message=f"{param}: {first['msg']}", code=code, param=param)
    return error_reply(body)


async def _client_left(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_reply(INTERNAL_ERROR)


def install(app: FastAPI) -> None:
    """Has ``app`` answer every error in the envelope of the client's API."""
    app.add_exception_handler(ServingError, _serving_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _query_error)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, _unexpected)
