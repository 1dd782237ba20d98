"""The page at ``/``: files that are the same for everyone. The page gets everything else from the API.

The names of the files contain a digest of all of them, so that a browser may keep them for ever. The page itself is
checked for changes whenever it is opened.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import PlainTextResponse, Response

from exo.api.http.errors import PROTECTION
from exo.api.page.reference import reference_page
from exo.worker.protocol.runners import RUNNERS

_FOLDER = Path(__file__).parent / "static"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""The kinds of files that are served; others, such as licences, are only packed."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)
"""Nothing from elsewhere, nothing inline, and only the sanitiser makes HTML of text."""
_HEADERS = {
    **PROTECTION,
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}
_TEXT = "exo is running; /docs tells what it offers\n"
"""The answer to programs, by which Ollama's clients recognise a server."""


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file with its media type and the age, as a cache policy, up to which a browser may use it unasked."""

    body: bytes
    media_type: str
    cache: str

    def response(self, request: Request) -> Response:
        """The file, or 304 if the client has it."""
        tag = f'"{sha256(self.body).hexdigest()[:32]}"'
        headers = {**_HEADERS, "cache-control": self.cache, "etag": tag, "vary": "accept"}
        known = (each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(","))
        if tag in known:
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers=headers, media_type=self.media_type)


@dataclass(frozen=True, slots=True)
class Page:
    """The page, and its other files by path."""

    index: PageFile
    files: Mapping[str, PageFile]
    folder: str

    @classmethod
    def read(cls) -> Self:
        """Reads the files of this package."""
        found = dict(_files())
        parts = b"".join(name.encode() + b"\0" + found[name] for name in sorted(found))
        folder = f"page/{sha256(parts).hexdigest()[:16]}"
        index = found.pop("index.html").decode().replace("{folder}", folder).replace("{runners}", " ".join(RUNNERS))
        return cls(
            _html(index),
            {
                f"/{folder}/{name}": PageFile(
                    body, _MEDIA_TYPES[Path(name).suffix], "public, max-age=31536000, immutable"
                )
                for name, body in found.items()
            },
            folder,
        )

    @property
    def paths(self) -> frozenset[str]:
        """The paths of the page, its files and the description of the API, which hold nothing secret."""
        return frozenset(("/", "/docs", *self.files))

    def reference(self, document: Mapping[str, Any]) -> PageFile:
        """The page that describes the API."""
        return _html(reference_page(document, self.folder))


def _html(text: str) -> PageFile:
    return PageFile(text.encode(), _MEDIA_TYPES[".html"], "no-cache")


def _files() -> Iterator[tuple[str, bytes]]:
    for path in _FOLDER.rglob("*"):
        if path.suffix in _MEDIA_TYPES:
            yield path.relative_to(_FOLDER).as_posix(), path.read_bytes()


def page_routes(page: Page) -> APIRouter:
    """The page for browsers, a line of text for other clients, and the page's files."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def root(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return page.index.response(request)
        return PlainTextResponse(_TEXT, headers={**PROTECTION, "vary": "accept"})

    reference: PageFile | None = None

    @routes.get("/docs")
    async def docs(request: Request) -> Response:
        nonlocal reference
        if reference is None:  # made once: it takes milliseconds of the event loop, and anyone may ask for it
            reference = page.reference(request.app.openapi())
        return reference.response(request)

    async def file(request: Request) -> Response:
        found = page.files.get(request.scope["path"])
        if found is None:  # the router also matches a path with a line end after it
            raise HTTPException(404)
        return found.response(request)

    for path in page.files:
        routes.add_api_route(path, file, methods=["GET"])
    return routes
