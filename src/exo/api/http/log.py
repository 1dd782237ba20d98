"""The server's log: one line for each message, whatever text a client or a model's file contributes.

The access log in it has one line for each request, when its reply is over.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial

from pydantic import JsonValue

from exo.api.http.errors import ErrorBody
from exo.serving.activity import RequestRecord, current_request_id

access_log = logging.getLogger("exo.access")

_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
"""Line ends and control characters, escaped as in a Python literal."""
_MONITORS = ("/health", "/ready", "/metrics", "/v1/instances", "/v1/activity", "/v1/activity/events")
"""Programs ask for these all the time. Only what is refused there is logged."""


class OneLineFormatter(logging.Formatter):
    """Escapes control characters, except in tracebacks."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return super().formatMessage(record).translate(_ESCAPES)


class JsonFormatter(logging.Formatter):
    """Makes a JSON object of each record: its time, level, request and message, and the facts of an access."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        line: dict[str, JsonValue] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
        }
        if own := current_request_id():
            line["request"] = own
        facts: Callable[[], dict[str, JsonValue]] | None = getattr(record, "facts", None)
        line |= {"message": record.getMessage()} if facts is None else {"message": "access", **facts()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def add_request_id(record: logging.LogRecord) -> bool:
    """A filter for log handlers that adds the id to the message. Keeps every record."""
    if own := current_request_id():
        record.msg, record.args = f"{record.getMessage()} (request {own})", ()
    return True


def log_access(record: RequestRecord) -> None:
    """Writes the line of a request that is over."""
    if (record.path in _MONITORS and record.phase != "failed") or not access_log.isEnabledFor(logging.INFO):
        return
    access_log.info("%s", ", ".join(_words(record)), extra={"facts": partial(_facts, record)})


def log_refusal(address: str, error: ErrorBody) -> None:
    """Writes the line of a request that was refused before it was read."""
    facts = {"client": address, "status": error.status, "error": error.code}
    access_log.info("%s, %d failed %s", address, error.status, error.code, extra={"facts": lambda: facts})


def _words(record: RequestRecord) -> Iterator[str]:
    yield " ".join(filter(None, (record.client, record.method, record.path, f"({record.dialect})")))
    yield " ".join(filter(None, (str(record.status or "no reply"), record.phase, record.error)))
    if (route := record.route) is not None:
        yield f"{record.model}@{route.place} ({route.reason})"
        yield f"queue {record.seconds_in('queued'):.3f} s"
        if load := record.seconds_in("loading"):
            yield f"load {load:.3f} s"
        if record.first_token is not None:
            yield f"first token {record.first_token - record.began:.3f} s"
        yield f"{record.prompt_tokens} tokens in ({record.cached_tokens} cached), {record.completion_tokens} out"
    yield f"{record.seconds:.3f} s"
    if record.finish_reason is not None:
        yield record.finish_reason
    if record.replays:
        yield f"{record.replays} replays"
    for prompt in record.prompts:
        yield f"prompt {prompt!r}"


def _facts(record: RequestRecord) -> dict[str, JsonValue]:
    route, first = record.route, record.first_token
    return {
        "client": record.client,
        "method": record.method,
        "path": record.path,
        "dialect": record.dialect,
        "model": record.model,
        "runner": None if route is None else route.runner,
        **({"host": route.host} if route is not None and route.host else {}),
        "instance": record.instance or None,
        "route": None if route is None else route.reason,
        "phase": record.phase,
        "status": record.status,
        "error": record.error or None,
        "queue_s": round(record.seconds_in("queued"), 4),
        "load_s": round(record.seconds_in("loading"), 4),
        "first_token_s": None if first is None else round(first - record.began, 4),
        "seconds": round(record.seconds, 4),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "finish_reason": record.finish_reason,
        "replays": record.replays,
        **({"prompts": list(record.prompts)} if record.prompts else {}),
    }
