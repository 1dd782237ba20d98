"""Errors that end a request: a code for programs and a message for people. The API maps them to HTTP statuses."""

from collections.abc import Mapping
from dataclasses import dataclass

from exo.chat.sandbox_pool import SandboxBusyError
from exo.worker.protocol.events import ErrorCode, Failed

_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Overflow:
    """A prompt is longer than the context, in tokens. The context holds the output as well."""

    prompt_tokens: int
    context_length: int


class ServingError(Exception):
    """Ends a request with an error for its client. ``param`` names the field of the request that causes it.

    ``retry_seconds`` is the time until a retry makes sense, if there is one. ``overflow`` is set if the prompt is too
    long.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_seconds: float | None = None,
        overflow: Overflow | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.retry_seconds = retry_seconds
        self.overflow = overflow


class RequestError(ServingError):
    """The request causes the error: it fails again until the client changes it, or the user a model card."""


_REQUEST_CODES: tuple[ErrorCode, ...] = ("invalid_request", "context_length_exceeded")
_MODEL_CODES: tuple[ErrorCode, ...] = ("model_not_found", "model_misconfigured")
"""These last until the user changes the model card or its files."""
_MEMBERS = ("prompt", "document")
"""The protocol's fields of which one request may have several."""
_TRANSIENT_CODES: tuple[ErrorCode, ...] = ("runner_died", "shutdown")


def from_failed(
    failed: Failed, *, params: Mapping[str, str], retry_seconds: float | None = None, member: int | None = None
) -> ServingError:
    """A runner's failure. ``params`` maps the protocol's fields to the client's where their names differ.

    ``member`` is the index of the prompt or document that failed, if the request has several.
    """
    param = failed.param.removeprefix("sampling.") if failed.param else None
    if failed.code == "context_length_exceeded":
        param = param or "prompt"
    message = failed.message
    if param is not None:
        indexed = member is not None and param in _MEMBERS
        param = params.get(param, param) + (f".{member}" if indexed else "")
        own = f"{failed.param}: "
        if indexed or message.startswith(own):
            message = f"{param}: {message.removeprefix(own)}"
    if failed.code in _MODEL_CODES:
        return RequestError(message, code=failed.code, param=param or "model")
    if failed.code == "context_length_exceeded" and failed.context_length:
        overflow = Overflow(failed.prompt_tokens, failed.context_length)
        return RequestError(_overflow_message(overflow, param), code=failed.code, param=param, overflow=overflow)
    if retry_seconds is None and failed.code in _REQUEST_CODES:
        return RequestError(message, code=failed.code, param=param)
    if retry_seconds is None and failed.code in _TRANSIENT_CODES:
        retry_seconds = _RETRY_SECONDS
    return ServingError(message, code=failed.code, param=param, retry_seconds=retry_seconds)


def _overflow_message(overflow: Overflow, param: str | None) -> str:
    """Agents shorten a conversation if they read these words, which are OpenAI's."""
    fits = overflow.prompt_tokens <= overflow.context_length
    return (
        f"This model's maximum context length is {overflow.context_length} tokens. However, your {param} resulted in "
        f"{overflow.prompt_tokens} tokens. Please reduce the length of the {param}"
        f"{'; the output needs tokens as well' if fits else ''}."
    )


def unknown_model(message: str) -> ServingError:
    """No model card has the requested name; ``message`` is that of ``Catalogue.unknown``."""
    return RequestError(message, code="model_not_found", param="model")


def queue_full(model_id: str, held: int) -> ServingError:
    """A model has as many sequences as it accepts."""
    message = f"{model_id} has {held} sequences running or waiting and takes no more for now; try again soon"
    return ServingError(message, code="queue_full", retry_seconds=_RETRY_SECONDS)


def busy(param: str, error: SandboxBusyError) -> ServingError:
    """Too many other requests wait for a chat template or a grammar."""
    return ServingError(f"{param}: {error}", code="server_busy", param=param, retry_seconds=_RETRY_SECONDS)


def shutting_down() -> ServingError:
    """The server stops, which refuses new requests and ends those that take too long."""
    return ServingError("the server is shutting down", code="shutdown", retry_seconds=_RETRY_SECONDS)


def cancelled() -> ServingError:
    """Another request has cancelled this one."""
    return ServingError("the request was cancelled", code="cancelled")


def model_changed(model_id: str, why: str) -> ServingError:
    """A request whose runner died cannot continue, because its model is not the same any more."""
    message = (
        f"{model_id}: the runner of this request is gone, and the request cannot continue on the present model: "
        f"{why}; send it again"
    )
    return ServingError(message, code="model_changed", retry_seconds=_RETRY_SECONDS)
