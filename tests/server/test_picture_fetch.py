"""Pictures that are given by address: from allowed hosts with public addresses only, and not for ever."""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from exo.serving.pictures.fetch import FetchError, fetch
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve
from tests.support.pictures import random_png

PNG = random_png(1)


class Files(BaseHTTPRequestHandler):
    """One picture, and paths that lead elsewhere. ``asked`` are the paths of all requests."""

    asked: list[str] = []  # noqa: RUF012 - one list for the server's life
    inside = ""
    """The host to which "/inside" leads."""
    gone = threading.Event()
    """"/silent" answers once it is set."""

    def do_GET(self) -> None:
        self.asked.append(self.path)
        targets = {"/moved": "/cat.png", "/round": "/round", "/away": "http://other.example/cat.png"}
        targets["/inside"] = f"http://{self.inside}/cat.png"
        if self.path == "/silent":
            self.gone.wait()
            return
        if (target := targets.get(self.path)) is not None:
            self.send_response(302)
            self.send_header("location", target)
            self.end_headers()
            return
        self.send_response(200 if self.path in ("/cat.png", "/endless") else 404)
        self.end_headers()
        if self.path == "/endless":
            try:
                while True:
                    self.wfile.write(bytes(1 << 20))
            except OSError:  # the client has gone
                return
        self.wfile.write(PNG)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


@contextmanager
def files() -> Generator[str]:
    """Yields host and port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"localhost:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def host() -> Generator[str]:
    with files() as host:
        yield host


async def get(host: str, path: str) -> bytes:
    """Has the loopback addresses count as public ones."""
    return await fetch(f"http://{host}{path}", [host], lambda _: True)


async def test_a_picture_is_fetched_also_behind_a_redirect(host: str) -> None:
    assert await get(host, "/cat.png") == await get(host, "/moved") == PNG


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/nothing", "the host answers with status 404"),
        ("/round", "the address leads to more than 3 others"),
        ("/away", "this server fetches pictures from localhost:"),
        ("/endless", "the picture has more than 16,777,216 bytes"),
    ],
)
async def test_what_is_no_picture_is_given_up(host: str, path: str, reason: str) -> None:
    with pytest.raises(FetchError, match=reason):
        await get(host, path)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.org/x.png", "fetches pictures from localhost:"),
        ("ftp://localhost/x.png", "must begin with http"),
        ("http://user@localhost/x.png", "must begin with http.*and have no user"),
        ("http://localhost:1/x.png", "fetches pictures from localhost:"),
        ("http://localhost:99999/x.png", "cannot be fetched"),
    ],
)
async def test_other_addresses_are_not_asked(host: str, url: str, reason: str) -> None:
    with pytest.raises(FetchError, match=reason):
        await fetch(url, [host], lambda _: True)


async def test_an_allowed_name_with_a_private_address_is_not_asked(host: str) -> None:
    Files.asked.clear()
    with pytest.raises(FetchError, match="the host has an address of a private network"):
        await fetch(f"http://{host}/cat.png", [host])
    assert Files.asked == []


async def test_a_redirect_to_an_allowed_name_with_a_private_address_is_not_followed(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([True, False])
    with files() as other:
        monkeypatch.setattr(Files, "inside", other)
        Files.asked.clear()
        with pytest.raises(FetchError, match="the host has an address of a private network"):
            await fetch(f"http://{host}/inside", [host, other], lambda _: next(answers))
    assert Files.asked == ["/inside"]


async def test_a_host_that_does_not_answer_is_given_up(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exo.serving.pictures.fetch._SECONDS", 0.5)
    try:
        with pytest.raises(FetchError, match=r"did not come within 0\.5 s"):
            await get(host, "/silent")
    finally:
        Files.gone.set()


def test_the_server_names_the_part_and_asks_nobody(host: str, tmp_path: Path) -> None:
    card = fake_card("fake/sees", chat_template=CHAT_TEMPLATE, mmproj="mmproj.gguf")
    content = [{"type": "image_url", "image_url": {"url": f"http://{host}/cat.png"}}]
    body = {"model": "fake/sees", "messages": [{"role": "user", "content": content}]}
    Files.asked.clear()
    with serve(tmp_path, card, image_hosts=(host,)) as url:
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "messages.0.content.0.image_url"
    assert error["message"] == "messages.0.content.0.image_url: the host has an address of a private network"
    assert Files.asked == []
