"""The id of the request that the present task serves. The API sets it; the log and cancelling use it."""

from contextvars import ContextVar

current_request: ContextVar[str] = ContextVar("current_request", default="")
"""Printable ASCII without spaces; empty in a task that serves no request."""
