"""The id of each request: the client's or a new one. The reply's headers have it, and each log line that it causes."""

import logging
import re
from uuid import uuid4

from exo.serving.activity import current_request_id

REQUEST_ID_HEADER = "x-request-id"
_ACCEPTED = re.compile(r"[!-~]{1,128}")


def new_request_id() -> str:
    """An id for a request whose client has sent none."""
    return f"req_{uuid4().hex}"


def accepted_or_new(given: str) -> str:
    """The client's id if it is short, printable ASCII; otherwise a new one."""
    return given if _ACCEPTED.fullmatch(given) else new_request_id()


def add_request_id(record: logging.LogRecord) -> bool:
    """A filter for log handlers that adds the id to the message. Keeps every record."""
    if own := current_request_id():
        record.msg, record.args = f"{record.getMessage()} (request {own})", ()
    return True
