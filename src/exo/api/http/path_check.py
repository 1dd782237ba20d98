"""Requests whose method or path is written otherwise than a route's."""

import re
from typing import final

from starlette.types import ASGIApp, Receive, Scope, Send

_SLASHES = re.compile(r"//+")


@final
class ForgivingPaths:
    """An ASGI application that hands requests to ``app`` as its routes are written.

    Slashes that are doubled or at the end of a path mean nothing. ``HEAD`` is answered as ``GET`` is; the server leaves
    the reply's body out.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "http":
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            scope = {**scope, "method": method, "path": route_path(scope["path"])}
        await self._app(scope, receive, send)


def route_path(path: str) -> str:
    """A request's path as routes are written."""
    return _SLASHES.sub("/", path).rstrip("/") or "/"
