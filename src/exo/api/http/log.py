"""The server's log: one line per message, whatever text a client or a model's file contributes."""

import json
import logging
import time
from collections.abc import Callable

from pydantic import JsonValue

from exo.serving.activity import current_request_id

_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
"""Line ends and control characters, escaped as in a Python literal."""


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
