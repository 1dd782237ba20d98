"""Errors as the client sees them, in the envelope of the API it speaks, whatever went wrong and wherever."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from exo.chat.sandbox_pool import SandboxBusyError
from exo.worker.protocol.messages import ErrorCode, Failed
from exo.worker.protocol.wire import describe
from exo.worker.router import Refusal

log = logging.getLogger(__name__)

_RETRY_SECONDS = "1"
_NO_FIELD = re.compile(r"\.\[[a-z_]+\]")
"""What is in an error's path besides fields: "[key]" for a key of a table, and the tags of a union's types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody:
    """What an error says: ``code`` for programs, ``param`` for the request's field at fault."""

    status: int
    message: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def openai(self) -> bytes:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return to_json({"error": error})

    def anthropic(self) -> bytes:
        """``{"type": "error", "error": {"type", "message"}}``."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return to_json({"type": "error", "error": {"type": kind, "message": self.message}})

    def ollama(self) -> bytes:
        """``{"error": message}``."""
        return to_json({"error": self.message})

    def in_envelope(self, path: str) -> bytes:
        """As the API says it that ``path`` belongs to: an error may come before anything else is known."""
        if _is_anthropic(path):
            return self.anthropic()
        return self.ollama() if path.startswith("/api/") else self.openai()

    def response(self, path: str, headers: Mapping[str, str] | None = None) -> Response:
        """The error as a whole reply to a request for ``path``, with ``headers`` added to its own."""
        own = dict(self.headers)
        if _is_anthropic(path):
            own["request-id"] = f"req_{uuid4().hex}"
        if self.status >= 500 and "retry-after" not in own:
            own["x-should-retry"] = "false"  # OpenAI's clients otherwise retry, and would load a broken model again
        return Response(
            self.in_envelope(path),
            status_code=self.status,
            headers={**own, **(headers or {})},
            media_type="application/json",
        )


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _is_anthropic(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")


class ApiError(Exception):
    """Ends a request with an error for its client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.body = ErrorBody(status=status, message=message, code=code, param=param, headers=headers or {})


INTERNAL_ERROR = ErrorBody(
    status=500, message="internal error; the server's log has the details", code="internal_error"
)

_STATUS: Mapping[ErrorCode, int] = {
    "invalid_request": 400,
    "context_length_exceeded": 400,
    "model_not_found": 404,
    "model_misconfigured": 400,
    "model_load_failed": 503,
    "out_of_memory": 503,
    "engine_error": 500,
    "runner_died": 503,
    "shutdown": 503,
}
_FOR_GOOD: tuple[ErrorCode, ...] = ("model_not_found", "model_misconfigured")
"""What holds until somebody changes the model card or its files."""
_WORTH_A_RETRY: tuple[ErrorCode, ...] = ("runner_died", "shutdown")


def from_failed(failed: Failed, *, params: Mapping[str, str], retry_seconds: float | None = None) -> ApiError:
    """A runner's failure. ``params`` are the client's names for the contract's fields, where they differ.

    With ``retry_seconds`` it is one that may be over by then.
    """
    param = failed.param.removeprefix("sampling.") if failed.param else None
    if failed.code == "context_length_exceeded":
        param = "prompt"
    message = failed.message
    if param is not None:
        param = params.get(param, param)
        if message.startswith(own := f"{failed.param}: "):
            message = f"{param}: {message.removeprefix(own)}"
    if failed.code in _FOR_GOOD:
        param = param or "model"
    elif retry_seconds is not None:
        headers = {"retry-after": str(math.ceil(retry_seconds))}
        return ApiError(503, message, code=failed.code, param=param, headers=headers)
    headers = {"retry-after": _RETRY_SECONDS} if failed.code in _WORTH_A_RETRY else {}
    return ApiError(_STATUS[failed.code], message, code=failed.code, param=param, headers=headers)


def from_refusal(refusal: Refusal, *, status: int) -> ApiError:
    """The router's refusal."""
    return ApiError(status, refusal.message, code=refusal.code, param=refusal.param)


def queue_full(model_id: str, held: int) -> ApiError:
    """A request that a model's queue has no place for."""
    message = f"{model_id} has {held} sequences running or waiting and takes no more for now; try again soon"
    return ApiError(429, message, code="queue_full", headers={"retry-after": _RETRY_SECONDS})


def busy(param: str, error: SandboxBusyError) -> ApiError:
    """A request whose template or grammar has to wait for too many others."""
    headers = {"retry-after": _RETRY_SECONDS}
    return ApiError(503, f"{param}: {error}", code="server_busy", param=param, headers=headers)


def shutting_down() -> ApiError:
    """A request that came, or was still running, when the server stopped."""
    headers = {"retry-after": _RETRY_SECONDS, "connection": "close"}
    return ApiError(503, "the server is shutting down", code="shutdown", headers=headers)


def from_validation(error: ValidationError) -> ApiError:
    """The first thing wrong with a request body, naming the field, the value and what would be accepted."""
    first = error.errors(include_url=False)[0]
    kind, reason = first["type"], first["msg"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is no JSON document: {reason}", code="invalid_json")
    param, message = describe(error)
    param, message = _NO_FIELD.sub("", param)[:200], _NO_FIELD.sub("", message)
    if "ctx" in first and "param" in first["ctx"]:  # of the errors that ``openai_requests`` makes
        param = ".".join(filter(None, (param, str(first["ctx"]["param"]))))
        return ApiError(400, f"{param}: {reason}", code=kind, param=param)
    if kind == "missing":
        return ApiError(400, f"{param}: this field is required", code="missing_parameter", param=param)
    message = message.removeprefix(": ")[:1000]
    return ApiError(400, message, code="invalid_value", param=param or None)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.body.response(request.url.path)


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
    return replace(body, headers=error.headers or {}).response(request.url.path)


async def _query_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: Mapping[str, object] = error.errors()[0]
    param = str(cast(tuple[object, ...], first["loc"])[-1])
    code = "missing_parameter" if first["type"] == "missing" else "invalid_value"
    body = ErrorBody(status=400, message=f"{param}: {first['msg']}", code=code, param=param)
    return body.response(request.url.path)


async def _client_left(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return INTERNAL_ERROR.response(request.url.path)


def install(app: FastAPI) -> None:
    """Makes every error of ``app`` answer in the envelope."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _query_error)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, _unexpected)
