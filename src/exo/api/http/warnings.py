"""The header that lists a request's warnings."""

from typing import final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exo.serving.warnings import RequestWarnings, collecting

HEADER = "x-exo-warning"


@final
class WarningHeader:
    """An ASGI application that collects the warnings of each request to ``app`` and adds the header to its reply."""

    def __init__(self, app: ASGIApp, *, strict: bool) -> None:
        self._app = app
        self._strict = strict
        self._logged: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        warnings = RequestWarnings(scope["path"], self._logged, strict=self._strict)

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start" and (text := warnings.in_one_line()):
                MutableHeaders(scope=message)[HEADER] = text
            await send(message)

        with collecting(warnings):
            await self._app(scope, receive, send_with_header)
