"""Warnings about a request: what was accepted without effect, told in the reply's header and in the log."""

import logging
from contextvars import ContextVar
from typing import final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

HEADER = "x-exo-warning"
MAX_WARNINGS = 24
"""Warnings of one request; more are counted only."""
_MAX_CHARACTERS = 2000
_MAX_TEXT = 300
_MAX_LOGGED = 1000
"""Different warnings that the log gets from one server, since clients choose the names of unknown fields."""


class _Warnings:
    """The warnings of one request. ``logged`` holds what the server has logged before."""

    def __init__(self, path: str, logged: set[str], *, strict: bool) -> None:
        self.strict = strict
        self._path = path
        self._logged = logged
        self._texts: dict[str, str] = {}
        self._more = 0

    def add(self, param: str, text: str) -> None:
        """Adds a warning, of which there is one for each ``param``, and logs it the first time."""
        whole = _printable(f"{param}: {text}" if param else text)
        key = param or whole
        if key in self._texts:
            return
        if len(self._texts) == MAX_WARNINGS:
            self._more += 1
            return
        self._texts[key] = whole
        once = f"{self._path} {key}"
        if once not in self._logged and len(self._logged) < _MAX_LOGGED:
            self._logged.add(once)
            log.warning("%s: %s", self._path, whole)

    def header(self) -> str:
        """All warnings in one line of bounded length; empty where there is none."""
        shown: list[str] = []
        room = _MAX_CHARACTERS
        for text in self._texts.values():
            room -= len(text) + 2
            if room < 0:
                break
            shown.append(text)
        more = len(self._texts) - len(shown) + self._more
        return "; ".join([*shown, f"and {more} more"] if more else shown)


_current: ContextVar[_Warnings | None] = ContextVar("warnings", default=None)


def _printable(text: str) -> str:
    text = text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
    return "".join(each if " " <= each <= "~" else "?" for each in text.replace("…", "..."))


def warn(param: str, text: str) -> None:
    """Adds ``param: text`` to the ``x-exo-warning`` header of the reply to the current request, and to the log.

    ``param`` is the client's name for the field, without list indices; it is empty where no field is the cause. The
    call must come before the reply's headers are sent; later warnings reach the log only. Where there is no request,
    nothing happens.
    """
    if (warnings := _current.get()) is not None:
        warnings.add(param, text)


def warn_of_context(param: str, wanted: int, context_length: int) -> None:
    """Warns of a request that counts on more room than the model is loaded with."""
    if wanted > context_length:
        where = "n_ctx in its card's table for the runner sets it"
        warn(param, f"the model is loaded with a context of {context_length} tokens (got {wanted}); {where}")


def refuses_unknown_fields() -> bool:
    """Whether the server runs with ``--strict``."""
    return (warnings := _current.get()) is not None and warnings.strict


@final
class WarningHeader:
    """An ASGI application that collects the warnings of each request and adds the header to its reply."""

    def __init__(self, app: ASGIApp, *, strict: bool) -> None:
        self._app = app
        self._strict = strict
        self._logged: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        warnings = _Warnings(scope["path"], self._logged, strict=self._strict)

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start" and (text := warnings.header()):
                MutableHeaders(scope=message)[HEADER] = text
            await send(message)

        token = _current.set(warnings)
        try:
            await self._app(scope, receive, send_with_header)
        finally:
            _current.reset(token)
