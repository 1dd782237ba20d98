"""A model hub on this machine. It has the part of the real hub's protocol that a pull uses, and faults on demand.

``python -m tests.support.hub FILE NAME`` serves one file as the repository org/model, prints its address, and
answers ``/sent`` with the bytes of content that have left the machine's sockets so far.
"""

import array
import fcntl
import hashlib
import json
import os
import re
import socket
import struct
import sys
import tempfile
import termios
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import time
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote, unquote, urlsplit

REPO = "org/model"
_IN_GIT = 1000
"""Files up to this size in bytes are in git itself, and the hub gives no SHA-256 for them."""


@dataclass(frozen=True, slots=True)
class Fault:
    """The fault of one request for a file's content; the next request has the next fault, or none."""

    kind: Literal["none", "reset", "close", "stall", "whole", "status", "wrong", "range", "more", "gzip"]
    at: int = 0
    """Bytes sent before a reset, an early end or a stall; 0 with "whole" is all."""
    status: int = 503
    retry_after: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a file's content or its redirect."""

    path: str
    host: str
    start: int
    token: str | None


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    size: int
    sha256: str
    blob: str
    large: bool

    @classmethod
    def of(cls, path: Path, large: bool) -> Self:
        size = path.stat().st_size
        sha256, blob = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode())
        with path.open("rb") as opened:
            while data := opened.read(1 << 20):
                sha256.update(data)
                blob.update(data)
        return cls(path, size, sha256.hexdigest(), blob.hexdigest(), large)


@dataclass(slots=True)
class State:
    """State that the servers of one hub share."""

    directory: Path
    commits: dict[str, dict[str, _File]] = field(default_factory=dict[str, dict[str, _File]])
    newest: dict[str, str] = field(default_factory=dict[str, str])
    listing_faults: list[Fault] = field(default_factory=list[Fault])
    faults: list[Fault] = field(default_factory=list[Fault])
    asked: list[Asked] = field(default_factory=list[Asked])
    listing_tokens: list[str | None] = field(default_factory=list[str | None])
    elsewhere: str | None = None
    """The address of another host that large files are redirected to."""
    token: str | None = None
    """The token that the hub itself asks for."""
    closed_until: float = 0
    """Seconds since the epoch; before that, content is answered with 429."""
    sent: int = 0
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self, faults: list[Fault]) -> Fault:
        with self.lock:
            return faults.pop(0) if faults else Fault("none")


class LocalHub:
    """The hub, and a second host that large files may be redirected to."""

    def __init__(self, token: str | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.state = State(Path(self._directory.name), token=token)
        self._servers = [_Server(self.state), _Server(self.state)]
        self.url = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.other_host = f"localhost:{self._servers[1].server_port}"

    def commit(self, files: Mapping[str, bytes | Path], repo: str = REPO) -> str:
        """Adds a commit with only these files; returns its hash."""
        held: dict[str, _File] = {}
        for at, (name, content) in enumerate(files.items()):
            path = content if isinstance(content, Path) else self.state.directory / f"{len(self.state.commits)}-{at}"
            if not isinstance(content, Path):
                path.write_bytes(content)
            held[name] = _File.of(path, path.stat().st_size > _IN_GIT)
        commit = hashlib.sha1(f"{repo} {len(self.state.commits)}".encode()).hexdigest()
        self.state.commits[f"{repo}@{commit}"] = held
        self.state.newest[repo] = commit
        return commit

    def sha256(self, name: str, repo: str = REPO) -> str:
        return self.state.commits[f"{repo}@{self.state.newest[repo]}"][name].sha256

    def claim(self, name: str, size: int) -> None:
        """Lists a file of the newest commit with a wrong size."""
        held = self.state.commits[f"{REPO}@{self.state.newest[REPO]}"]
        held[name] = replace(held[name], size=size)

    @property
    def starts(self) -> list[int]:
        """The byte at which each request for content began."""
        return [asked.start for asked in self.state.asked if asked.path.startswith("/content/")]

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.state.go_on.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._directory.cleanup()


class _Server(ThreadingHTTPServer):
    def __init__(self, state: State) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.state = state

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignores clients that were killed."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # pyright: ignore[reportArgumentType]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/sent":
            self._answer(200, str(self.server.state.sent).encode())
        elif path.startswith("/content/"):
            self._content(path)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._listing(match[1], match[2])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([0-9a-f]{40})", path):
            self._tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        """What huggingface_hub's own downloader asks for: a file's size, hash and commit."""
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", unquote(urlsplit(self.path).path))
        file = self.server.state.commits.get(f"{match[1]}@{match[2]}", {}).get(match[3]) if match else None
        self.send_response(404 if file is None else 200)
        if file is not None and match is not None:
            self.send_header("content-length", str(file.size))
            self.send_header("etag", f'"{file.sha256 if file.large else file.blob}"')
            self.send_header("x-repo-commit", match[2])
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """The tests read ``asked``."""

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _refused(self, fault: Fault) -> bool:
        if fault.kind != "status":
            return False
        after = {"retry-after": fault.retry_after} if fault.retry_after is not None else None
        self._answer(fault.status, b"not now", after)
        return True

    def _authorised(self) -> bool:
        token = self.server.state.token
        return token is None or self.headers.get("authorization") == f"Bearer {token}"

    def _listing(self, repo: str, revision: str | None) -> None:
        state = self.server.state
        state.listing_tokens.append(self.headers.get("authorization"))
        if self._refused(state.next_fault(state.listing_faults)):
            return
        commit = state.newest.get(repo) if revision in (None, "main") else revision
        held = state.commits.get(f"{repo}@{commit}")
        if held is None:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif not self._authorised():
            self._answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        else:
            siblings = [
                {"rfilename": name, "size": file.size, "blobId": file.blob}
                | ({"lfs": {"size": file.size, "sha256": file.sha256, "pointerSize": 130}} if file.large else {})
                for name, file in held.items()
            ]
            body = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []}
            self._answer(200, json.dumps(body).encode(), {"content-type": "application/json"})

    def _tree(self, repo: str, commit: str) -> None:
        """The listing of huggingface_hub's own downloader."""
        entries = [
            {"type": "file", "path": name, "size": file.size, "oid": file.blob}
            | ({"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 130}} if file.large else {})
            for name, file in self.server.state.commits.get(f"{repo}@{commit}", {}).items()
        ]
        self._answer(200, json.dumps(entries).encode(), {"content-type": "application/json"})

    def _resolve(self, repo: str, commit: str, name: str) -> None:
        """Redirects large files; small ones are here, at the address of their content."""
        state = self.server.state
        file = state.commits.get(f"{repo}@{commit}", {}).get(name)
        state.asked.append(Asked(self.path, self.headers["host"], self._start(), self.headers.get("authorization")))
        if file is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif not self._authorised():
            self._answer(401, b"")
        else:
            host = f"http://{state.elsewhere}" if state.elsewhere and file.large else ""
            etag = {"x-repo-commit": commit, "x-linked-etag": f'"{file.sha256}"', "x-linked-size": str(file.size)}
            self._answer(302, b"", {"location": f"{host}/content/{repo}@{commit}/{quote(name)}", **etag})

    def _start(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("range", ""))
        return int(match[1]) if match else 0

    def _end(self, size: int) -> int:
        """The end of the requested range, if it is before the end of the file."""
        match = re.fullmatch(r"bytes=\d+-(\d+)", self.headers.get("range", ""))
        return min(int(match[1]) + 1, size) if match else size

    def _content(self, path: str) -> None:
        state = self.server.state
        start = self._start()
        state.asked.append(Asked(path, self.headers["host"], start, self.headers.get("authorization")))
        where, _, name = path.removeprefix("/content/").partition("@")
        commit, _, name = name.partition("/")
        file = state.commits[f"{where}@{commit}"][name]
        fault = state.next_fault(state.faults)
        if fault.kind == "none" and time() < state.closed_until:
            fault = Fault("status", status=429)
        if self._refused(fault):
            return
        if start >= file.size > 0:
            self._answer(416, b"", {"content-range": f"bytes */{file.size}"})
            return
        end = self._end(file.size)
        if fault.kind == "whole":
            start, end = 0, file.size
        self._head(file, start, end, fault)
        self._body(file, start, end, fault)

    def _head(self, file: _File, start: int, end: int, fault: Fault) -> None:
        ranged = "range" in self.headers and fault.kind != "whole"
        self.send_response(206 if ranged else 200)
        if ranged:
            shown = 0 if fault.kind == "range" else start
            self.send_header("content-range", f"bytes {shown}-{end - 1}/{file.size}")
        if fault.kind == "gzip":
            self.send_header("content-encoding", "gzip")
        if fault.kind == "close" or (fault.kind == "whole" and fault.at):
            self.send_header("connection", "close")
            self.close_connection = True
        self.send_header("content-length", str(end - start + (7 if fault.kind == "more" else 0)))
        self.end_headers()

    def _body(self, file: _File, start: int, end: int, fault: Fault) -> None:
        short = fault.kind in ("reset", "close", "stall") or (fault.kind == "whole" and fault.at)
        stop = min(start + fault.at, end) if short else end
        with file.path.open("rb") as opened:
            if fault.kind == "wrong":
                self._send(bytes(byte ^ 1 for byte in opened.read()[start:end]))
                return
            self._send_file(opened.fileno(), start, stop)
            if fault.kind == "more":
                self._send(b"surplus")
            elif fault.kind == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
            elif fault.kind == "stall":
                self.server.state.stalled.set()
                self.server.state.go_on.wait(60)
                self._send_file(opened.fileno(), stop, end)

    def _send(self, data: bytes) -> None:
        self.connection.sendall(data)
        self.server.state.sent += len(data)

    def _send_file(self, opened: int, start: int, end: int) -> None:
        at, lost = start, 0
        try:
            while at < end:
                at += os.sendfile(self.connection.fileno(), opened, at, min(end - at, 1 << 20))
        except OSError:
            lost = _unsent(self.connection)
            raise
        finally:
            with self.server.state.lock:
                self.server.state.sent += at - start - lost


def _unsent(connection: socket.socket) -> int:
    """Bytes in the socket that the other side has not acknowledged."""
    waiting = array.array("i", [0])
    try:
        fcntl.ioctl(connection, termios.TIOCOUTQ, waiting)
    except OSError:
        return 0
    return waiting[0]


if __name__ == "__main__":
    with LocalHub() as hub:
        hub.commit({sys.argv[2]: Path(sys.argv[1])})
        print(hub.url, flush=True)
        sys.stdin.read()
