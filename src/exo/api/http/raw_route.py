"""Endpoints that read the request and make the response themselves."""

import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute


class DirectRoute(APIRoute):
    """Calls an endpoint that takes only the request and returns a response directly.

    FastAPI's own handler would look for parameters to find and for a reply to encode. It serves all other endpoints.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See ``APIRoute``."""
        signature = inspect.signature(self.endpoint)
        takes = [parameter.annotation for parameter in signature.parameters.values()]
        returns = signature.return_annotation
        if takes == [Request] and isinstance(returns, type) and issubclass(returns, Response):
            return self.endpoint
        return super().get_route_handler()
