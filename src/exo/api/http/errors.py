"""Errors with their HTTP status, in the envelopes of the APIs."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError
from pydantic_core import to_json

from exo.serving.errors import Overflow, RequestError, ServingError
from exo.worker.protocol.validation import describe

PROTECTION = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
"""Headers of replies that a browser may show by themselves: they are what they say and contain nothing to run."""
_NO_FIELD = re.compile(r"\.\[[a-z_]+\]")
"""Parts of an error's path that are no fields: "[key]" for a key of a table, and the tags of a union's types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody:
    """An error with its HTTP status. ``code`` is for programs; ``param`` names the request's field at fault.

    Agents recognise a prompt that is too long, ``overflow``, by the words of the API that they use.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    overflow: Overflow | None = None

    def openai(self) -> bytes:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return to_json({"error": {**error, **self._sizes()}})

    def anthropic(self) -> bytes:
        """``{"type": "error", "error": {"type", "message"}}``."""
        message = self.message
        if self.overflow is not None:
            size, most = self.overflow.prompt_tokens, self.overflow.context_length - 1
            message = f"prompt is too long: {size} tokens > {most} maximum"
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return to_json({"type": "error", "error": {"type": kind, "message": message, **self._sizes()}})

    def ollama(self) -> bytes:
        """``{"error": message}``."""
        message = self.message
        if self.overflow is not None:
            excess = max(1, self.overflow.prompt_tokens - self.overflow.context_length)
            member = f"{self.param}: " if self.param and "." in self.param else ""  # one of several texts
            message = f"{member}prompt too long; exceeded max context length by {excess} tokens"
        return to_json({"error": message, **self._sizes()})

    def _sizes(self) -> dict[str, int]:
        """llama-server's fields of a prompt that is too long."""
        if self.overflow is None:
            return {}
        return {"n_prompt_tokens": self.overflow.prompt_tokens, "n_ctx": self.overflow.context_length}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(ServingError):
    """An error of HTTP itself, or of one API alone."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.status = status
        self.headers = headers or {}


INTERNAL_ERROR = ErrorBody(
    status=500, message="internal error; the server's log has the details", code="internal_error"
)

_STATUS: Mapping[str, int] = {
    "busy": 409,
    "cancelled": 409,
    "denied": 403,
    "disk_full": 507,
    "engine_error": 500,
    "queue_full": 429,
    "unreachable": 502,
    "unsafe_name": 502,
    "wrong_content": 502,
}
"""The statuses of codes that are not 400 for the request's own errors, and 503 for all others."""
_NOT_FOUND = ("model_not_found", "model_not_downloaded", "not_found")


def error_body(error: ServingError) -> ErrorBody:
    """The error with its HTTP status and headers."""
    if isinstance(error, ApiError):
        return ErrorBody(
            status=error.status, message=str(error), code=error.code, param=error.param, headers=error.headers
        )
    headers: dict[str, str] = {}
    if error.retry_seconds is not None:
        headers["retry-after"] = str(math.ceil(error.retry_seconds))
    if error.code == "shutdown":
        headers["connection"] = "close"
    if error.code in _NOT_FOUND:
        status = 404
    elif isinstance(error, RequestError):
        status = 400
    else:
        status = _STATUS.get(error.code, 503)
        if status == 500 and error.retry_seconds is not None:
            status = 503
    return ErrorBody(
        status=status,
        message=str(error),
        code=error.code,
        param=error.param,
        headers=headers,
        overflow=error.overflow,
    )


def from_validation(error: ValidationError) -> ApiError:
    """The first error in a request body. The message names the field, the value and what is accepted."""
    first = error.errors(include_url=False)[0]
    kind, reason = first["type"], first["msg"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not a JSON document: {reason}", code="invalid_json")
    param, message = describe(error)
    param, message = _NO_FIELD.sub("", param)[:200], _NO_FIELD.sub("", message)
    if "ctx" in first and "param" in first["ctx"]:  # an error of ``api.http.body``
        param = ".".join(filter(None, (param, str(first["ctx"]["param"]))))
        return ApiError(400, f"{param}: {reason}", code=kind, param=param)
    if kind == "missing":
        return ApiError(400, f"{param}: this field is required", code="missing_parameter", param=param)
    message = message.removeprefix(": ")[:1000]
    return ApiError(400, message, code="invalid_value", param=param or None)
