"""Errors as the client sees them: OpenAI's envelope, whatever went wrong and wherever."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from exo.worker.messages import ErrorCode, Failed
from exo.worker.router import Refusal
from exo.worker.wire import describe

log = logging.getLogger(__name__)

_RETRY_SECONDS = "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody:
    """What an error says: ``code`` for programs, ``param`` for the request's field at fault."""

    status: int
    message: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def envelope(self) -> bytes:
        """``{"error": {"message", "type", "param", "code"}}``, as OpenAI has it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return to_json({"error": error})

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The error as a whole reply, with ``headers`` added to its own."""
        own = dict(self.headers)
        if self.status >= 500 and "retry-after" not in own:
            own["x-should-retry"] = "false"  # OpenAI's clients otherwise retry, and would load a broken model again
        return Response(
            self.envelope(), status_code=self.status, headers={**own, **(headers or {})}, media_type="application/json"
        )


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
    "model_not_found": 503,
    "model_load_failed": 503,
    "out_of_memory": 503,
    "engine_error": 500,
    "runner_died": 503,
    "shutdown": 503,
}
_WORTH_A_RETRY: tuple[ErrorCode, ...] = ("runner_died", "shutdown")


def from_failed(failed: Failed, *, prompt_field: str, retry_seconds: float | None = None) -> ApiError:
    """A runner's failure. ``prompt_field`` is what the dialect calls the contract's ``prompt``.

    With ``retry_seconds`` it is one that may be over by then.
    """
    param = failed.param.removeprefix("sampling.") if failed.param else None
    if param == "prompt" or failed.code == "context_length_exceeded":
        param = prompt_field
    if retry_seconds is not None:
        headers = {"retry-after": str(math.ceil(retry_seconds))}
        return ApiError(503, failed.message, code=failed.code, param=param, headers=headers)
    headers = {"retry-after": _RETRY_SECONDS} if failed.code in _WORTH_A_RETRY else {}
    return ApiError(_STATUS[failed.code], failed.message, code=failed.code, param=param, headers=headers)


def from_refusal(refusal: Refusal, *, status: int) -> ApiError:
    """The router's refusal."""
    return ApiError(status, refusal.message, code=refusal.code, param=refusal.param)


def queue_full(model_id: str, held: int) -> ApiError:
    """A request that a model's queue has no place for."""
    message = f"{model_id} has {held} sequences running or waiting and takes no more for now; try again soon"
    return ApiError(429, message, code="queue_full", headers={"retry-after": _RETRY_SECONDS})


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
    param = param.removesuffix(".[key]")[:200]
    if "ctx" in first and "param" in first["ctx"]:  # of the errors that ``openai_requests`` makes
        param = ".".join(filter(None, (param, str(first["ctx"]["param"]))))
        return ApiError(400, f"{param}: {reason}", code=kind, param=param)
    if kind == "missing":
        return ApiError(400, f"{param}: this field is required", code="missing_parameter", param=param)
    message = message.replace(".[key]", "").removeprefix(": ")[:1000]
    return ApiError(400, message, code="invalid_value", param=param or None)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.body.response()


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
    return replace(body, headers=error.headers or {}).response()


async def _query_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: Mapping[str, object] = error.errors()[0]
    param = str(cast(tuple[object, ...], first["loc"])[-1])
    code = "missing_parameter" if first["type"] == "missing" else "invalid_value"
    return ErrorBody(status=400, message=f"{param}: {first['msg']}", code=code, param=param).response()


async def _client_left(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return INTERNAL_ERROR.response()


def install(app: FastAPI) -> None:
    """Makes every error of ``app`` answer in the envelope."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _query_error)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, _unexpected)
