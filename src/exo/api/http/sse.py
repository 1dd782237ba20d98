"""Server-sent events: framing only, as bytes. Source: WHATWG HTML, "Server-sent events"."""

MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Proxies must not buffer a stream."""
KEEP_ALIVE_SECONDS = 10.0
"""The longest pause in a stream. Clients and proxies give up a connection on which nothing comes."""

DONE = b"data: [DONE]\n\n"


def event(data: bytes) -> bytes:
    """One event. ``data`` is a JSON document and contains no line break."""
    return b"data: " + data + b"\n\n"


def comment(text: str) -> bytes:
    """A line that clients skip."""
    return b": " + " ".join(text.split()).encode() + b"\n\n"
