"""ASGI applications that every request passes: access control, forgiving paths, the header with warnings.

A web page can send requests to a server on the same machine. Two checks keep it out: its origin, which the browser
states, and the host name that it used, because a name that resolves to this machine by DNS rebinding is unknown here.
"""

import hmac
import ipaddress
import re
from collections.abc import Container, Iterable
from functools import lru_cache
from hashlib import sha256
from typing import final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exo.api.http.error_reply import error_reply
from exo.api.http.errors import ErrorBody
from exo.config import Access, Settings, is_loopback
from exo.serving.warnings import RequestWarnings, collecting

EXPOSED_HEADERS = "retry-after, request-id, x-request-id, x-exo-runner, x-exo-host, x-exo-route, x-exo-warning"
"""The headers of a reply that a page of another origin may read."""
WARNING_HEADER = "x-exo-warning"
_PREFLIGHT_SECONDS = "600"
_HEADER_NAMES = re.compile(r"[A-Za-z0-9_, -]{0,2000}")
_SLASHES = re.compile(r"//+")
_OLLAMA = re.compile(r"/ollama(/api)?(?=/(?:api|v1)/)")
_WITHOUT_V1 = re.compile(r"(?=/(?:chat/completions|completions|embeddings|messages|models|responses)(?:/|$))")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:[0-9]{1,5})?")


class DeniedError(Exception):
    """The request is denied with the reply ``body``."""

    def __init__(self, body: ErrorBody) -> None:
        super().__init__(body.message)
        self.body = body


@final
class AccessControl:
    """An ASGI application that answers forbidden requests and passes the others to ``app``.

    ``open_paths`` need no key.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, open_paths: Container[str]) -> None:
        self._app = app
        self._open_paths = open_paths
        self._access = settings.access
        self._hosts = _AllowedHosts(settings.access, is_local=settings.is_local)
        self._digests = [sha256(key.key.encode()).digest() for key in settings.access.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = None
        try:
            self._hosts.check(headers.getlist("host"))
            origin = self._foreign_origin(headers)
            if origin is not None and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await self._preflight(headers, origin)(scope, receive, send)
                return
            if route_path(scope["path"]) not in self._open_paths:
                self._check_key(headers)
        except DeniedError as denied:
            await error_reply(denied.body, self._cors(origin))(scope, receive, send)
            return
        await self._app(scope, receive, send if origin is None else self._sharing(send, origin))

    def _foreign_origin(self, headers: Headers) -> str | None:
        """The origin of an allowed page from elsewhere; None for any other client."""
        origins = headers.getlist("origin")
        if not origins or origins == [_same_origin(headers, origins[0])]:
            return None
        if len(origins) == 1 and ("*" in self._access.cors_origins or origins[0] in self._access.cors_origins):
            return origins[0]
        message = f"pages of {origins[0][:200]!r} may not use this server; --cors-origin allows an origin"
        raise _denied(403, message, "origin_not_allowed")

    def _check_key(self, headers: Headers) -> None:
        """Compares all keys in full, so that the time reveals nothing."""
        if not self._digests:
            return
        digests = [sha256(given.encode()).digest() for given in _given_keys(headers)]
        matches = [hmac.compare_digest(digest, own) for digest in digests for own in self._digests]
        if not any(matches):
            how = "give it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            reason = "the API key is wrong" if digests else "an API key is needed"
            raise _denied(401, f"{reason}; {how}", "invalid_api_key", {"www-authenticate": 'Bearer realm="exo"'})

    def _cors(self, origin: str | None) -> dict[str, str]:
        """Never allows credentials: the server has no cookies, and a page sets the key's header itself."""
        if origin is None:
            return {}
        allowed = "*" if "*" in self._access.cors_origins else origin
        return {"access-control-allow-origin": allowed, "access-control-expose-headers": EXPOSED_HEADERS}

    def _preflight(self, headers: Headers, origin: str) -> Response:
        wanted = headers.get("access-control-request-headers", "")
        allowed = {
            **self._cors(origin),
            "access-control-allow-methods": "GET, HEAD, POST, DELETE",
            "access-control-allow-headers": wanted if _HEADER_NAMES.fullmatch(wanted) else "",
            "access-control-max-age": _PREFLIGHT_SECONDS,
            "vary": "origin",
        }
        return Response(status_code=204, headers=allowed)

    def _sharing(self, send: Send, origin: str) -> Send:
        async def send_shared(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(self._cors(origin))
                headers.add_vary_header("origin")
            await send(message)

        return send_shared


@final
class _AllowedHosts:
    """The ``Host`` headers that are this server's own.

    Addressed from this machine only, the server has loopback's names. Beyond it, an address as such cannot have been
    rebound, and where keys are asked for, no page of a rebound name has one.
    """

    def __init__(self, access: Access, *, is_local: bool) -> None:
        self._names = frozenset(name.lower() for name in access.allowed_hosts)
        self._any = "*" in self._names or bool(not is_local and access.keys and not access.allowed_hosts)
        self._any_address = not is_local
        self._allows = lru_cache(maxsize=16)(self._judge)

    def check(self, hosts: Iterable[str]) -> None:
        """Raises DeniedError. Every browser sends the header, so a request without one passes."""
        for host in hosts:
            match = _HOST.fullmatch(host)
            if match is None or not self._allows(match[1].strip("[]").lower().removesuffix(".")):
                message = f"this server is not called {host[:200]!r}; --allowed-host gives it a further name"
                raise _denied(403, message, "host_not_allowed")

    def _judge(self, name: str) -> bool:
        return self._any or name in self._names or is_loopback(name) or (self._any_address and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same_origin(headers: Headers, origin: str) -> str | None:
    """``origin`` if it is this server under the host name of the request, possibly behind a proxy."""
    return origin if origin.partition("://")[2] == headers.get("host") else None


def _given_keys(headers: Headers) -> list[str]:
    bearers = [value.partition(" ") for value in headers.getlist("authorization")]
    found = [key.strip() for scheme, _, key in bearers if scheme.lower() == "bearer"]
    return [*found, *(key.strip() for key in headers.getlist("x-api-key"))]


def _denied(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> DeniedError:
    return DeniedError(ErrorBody(status=status, message=message, code=code, headers=headers or {}))


@final
class ForgivingPaths:
    """An ASGI application that normalises paths and methods before it passes requests to ``app``.

    See ``route_path`` for paths. ``HEAD`` is answered as ``GET`` is; the server leaves the reply's body out. A reply
    without an end can see from the scope's ``only_head`` that nobody reads it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "http":
            only_head = scope["method"] == "HEAD"
            method = "GET" if only_head else scope["method"]
            scope = {**scope, "method": method, "only_head": only_head, "path": route_path(scope["path"])}
        await self._app(scope, receive, send)


def route_path(path: str) -> str:
    """The normalised path of a request. OpenAI's paths need no "/v1", and upstream has Ollama's below "/ollama"."""
    path = _SLASHES.sub("/", path).rstrip("/") or "/"
    if path.startswith("/ollama/"):
        path = _OLLAMA.sub("", path, count=1)
    return _WITHOUT_V1.sub("/v1", path, count=1) if _WITHOUT_V1.match(path) else path


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
                MutableHeaders(scope=message)[WARNING_HEADER] = text
            await send(message)

        with collecting(warnings):
            await self._app(scope, receive, send_with_header)
