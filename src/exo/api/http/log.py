"""The server's log: one line a message, whatever a client or a model's file put into it."""

import logging

_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
"""What ends a line, or speaks to a terminal, as a Python literal has it."""


class OneLineFormatter(logging.Formatter):
    """Escapes control characters, but for those of a traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return super().formatMessage(record).translate(_ESCAPES)
