"""One HTTP request for a file's content, redirects followed.

Through urllib: a gigabyte costs a third of the processor time that it costs through httpx, which passes it on in pieces
of 64 KiB and copies each of them three times.
"""

import urllib.request
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit

import httpx

_TIMEOUT_SECONDS = 30
_TOKEN = "Authorization"


class ConnectionLost(Exception):  # noqa: N818 - not an error yet: it may be tried again
    """No answer, or not all of it."""


class _Redirect(urllib.request.HTTPRedirectHandler):
    """The token goes on to the same host only, and nothing goes anywhere but over HTTP."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https"):
            raise HTTPError(newurl, code, "redirected to what is not HTTP", headers, fp)
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and (old.scheme, old.netloc) == (new.scheme, new.netloc) and req.has_header(_TOKEN):
            following.add_unredirected_header(_TOKEN, req.get_header(_TOKEN, ""))
        return following


class Client:
    """Proxies are those of the environment, certificates those that httpx trusts, as in the rest of exo."""

    def __init__(self) -> None:
        https = urllib.request.HTTPSHandler(context=httpx.create_ssl_context())
        self._opener = urllib.request.build_opener(https, _Redirect())

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str], start: int) -> Generator[HTTPResponse | HTTPError]:
        """The answer, whatever its status, from byte ``start`` on if the server does ranges. Raises ConnectionLost."""
        request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        for name, value in headers.items():
            add = request.add_unredirected_header if name.title() == _TOKEN else request.add_header
            add(name, value)
        try:
            answer = self._opener.open(request, timeout=_TIMEOUT_SECONDS)
        except HTTPError as error:
            answer = error
        except (OSError, HTTPException, ValueError) as error:
            raise ConnectionLost(_cause(error)) from error
        with answer:
            yield answer


def pieces(answer: HTTPResponse, size: int) -> Generator[bytes]:
    """The body as it comes, at most ``size`` bytes at a time. Raises ConnectionLost."""
    while True:
        try:
            data = answer.read1(size)
        except (OSError, HTTPException, ValueError) as error:
            raise ConnectionLost(_cause(error)) from error
        if not data:
            return
        yield data


def _cause(error: Exception) -> str:
    return str(error) or type(error).__name__
