"""The server's log: one line per message, whatever text a client or a model's file contributes."""

import logging

_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
"""Line ends and control characters, escaped as in a Python literal."""


class OneLineFormatter(logging.Formatter):
    """Escapes control characters, except in tracebacks."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return super().formatMessage(record).translate(_ESCAPES)
