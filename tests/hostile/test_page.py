"""Hostile input to the page's routes: ``/``, ``/docs`` and the page's files, on a server that is a program.

The rows are those of the table that test_input follows, and tests here are named by them.

1 to 5     bodies, which are not read; wrong values in the query and in headers; large and many headers, long paths
6 to 9     nesting, parameters, prompts: no JSON is read and no engine is asked
10, 24, 27 invalid UTF-8, NUL, paths that lead elsewhere, the names of another build
11         text that is slow to parse: none is parsed here; in the browser: page/test_chat
12         slow heads, idle sockets: the same for every route: server/test_connection, server/test_file_limits
15, 16, 19, 20    runners that are killed, are stopped or cannot load; in the browser: page/test_chat
13, 14, 17, 18    clients that leave or never read; the server killed: nothing of the page outlives it; SIGTERM
21 to 23, 26    model files, templates, downloads: no route touches any; the words about them: page/test_views
25         pictures by URL: no route fetches any; nor does the browser: page/test_chat, page/test_views
28 to 31   hosts, origins, methods, frames; keys; floods; forged lines of the log (no file is read after the start)
"""

import json
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.client import HTTPResponse
from pathlib import Path

import httpx
import psutil
import pytest

from exo.api.page.routes import Page
from tests.support.fake_model import expected_text
from tests.support.hosts import wait_until
from tests.support.program import DEADLINE_SECONDS
from tests.support.server import ServeProgram, write_card

BROWSER = {"accept": "text/html,*/*;q=0.8"}
KEY = "correct-horse-battery"
FILES = Page.read().files
FILE = max(FILES, key=lambda path: len(FILES[path].body))
FOLDER = FILE.partition("/vendor/")[0]
PATHS = ("/", "/docs", FILE)
each_path = pytest.mark.parametrize("path", PATHS, ids=["page", "docs", "file"])
GET = "GET {} HTTP/1.1\r\nHost: localhost\r\nAccept: text/html\r\n"


def write_cards(home: Path) -> None:
    for name, table in {"good": {}, "slow": {"step_seconds": 0.005}, "broken": {"fail_load": "out of memory"}}.items():
        write_card(home, name, {"cuda": table}, backends=["LlamaCppCpu"])


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_cards(home)
    with ServeProgram(home, fake=True) as server:
        yield server


@pytest.fixture
def server(program: ServeProgram) -> Iterator[ServeProgram]:
    """The server, which after each test must serve the page and the same runner, and have logged no exception."""
    assert program.complete("good", max_tokens=1).status_code == 200
    before = pid(program, "good")
    yield program
    for path in PATHS:
        assert program.client.get(path, headers=BROWSER).status_code == 200
    assert program.complete("good", max_tokens=1).status_code == 200
    assert pid(program, "good") == before
    assert "Traceback" not in program.log.read_text()


def pid(server: ServeProgram, name: str) -> int:
    instances = server.client.get("/v1/instances").json()["data"]
    return next(each["pid"] for each in instances if each["model"] == f"test/{name}")


def connect(server: ServeProgram) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 0), timeout=DEADLINE_SECONDS)


def read(client: socket.socket) -> httpx.Response:
    reply = HTTPResponse(client)
    reply.begin()
    return httpx.Response(reply.status, headers=reply.getheaders(), content=reply.read())


def ask(server: ServeProgram, target: str, *headers: str) -> httpx.Response:
    """The reply to a head that no client library would send."""
    lines = (*headers, "Connection: close", "", "")
    with connect(server) as client:
        client.sendall((GET.format(target) + "\r\n".join(lines)).encode("latin-1"))
        return read(client)


def whole(server: ServeProgram, path: str) -> bytes:
    return server.client.get(path, headers=BROWSER).content


def refused(reply: httpx.Response) -> int:
    """The status of an error, which must be in the API's envelope, and nothing that a browser would run or frame."""
    assert reply.json()["error"]["message"]
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    return reply.status_code


def stream(server: ServeProgram, tokens: int, meanwhile: Callable[[], object]) -> str:
    """The text of a stream during which something is done."""
    body = {"model": "slow", "prompt": "hi", "max_tokens": tokens, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=DEADLINE_SECONDS) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("data: {"))
        first = next(lines)
        meanwhile()
        chunks = [json.loads(line.removeprefix("data: ")) for line in (first, *lines)]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


@each_path
@pytest.mark.parametrize("framing", ["Content-Length: 1099511627776", "Transfer-Encoding: chunked"])
def test_row_4_a_body_without_an_end_is_not_kept(server: ServeProgram, path: str, framing: str) -> None:
    piece = bytes(1 << 20) if "Length" in framing else b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    expected = whole(server, path)
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    with connect(server) as client:
        client.sendall(f"{GET.format(path)}{framing}\r\n\r\n".encode())
        for _ in range(128):
            client.sendall(piece)
        reply = read(client)
        assert (reply.status_code, reply.content) == (200, expected)
        assert process.memory_info().rss - before < 64 << 20


WRONG = {
    "Range": "bytes=0-0,1-99999999999999999999,-5",
    "If-None-Match": '"' + '",W/' * 10_000,
    "If-Modified-Since": "Thu, 32 Feb 99999999 99:99:99 GMT\xff",
    "Accept": "text/html" + ";q=" * 10_000,
    "X-Forwarded-Host": "evil.example",
}
BODIES: tuple[tuple[bytes, dict[str, str]], ...] = (
    (b'{"model": ', {"content-type": "application/json"}),
    (b"x" * 1000, {"content-type": "text/plain"}),
    (b"\x1f\x8b" + bytes(1000), {"content-encoding": "gzip"}),
    (bytes(17 << 20), {}),
)


@each_path
def test_rows_1_to_4_bodies_and_wrong_values_change_nothing(server: ServeProgram, path: str) -> None:
    expected = whole(server, path)
    replies = [ask(server, path, f"{name}: {value}") for name, value in WRONG.items()]
    replies += [ask(server, f"{path}?{query}") for query in ("%00%ff%=&&", "a" * 60_000, "n=1e999&x[]={}")]
    replies += [server.client.request("GET", path, content=body, headers=BROWSER | more) for body, more in BODIES]
    for reply in replies:
        assert (reply.status_code, reply.content) == (200, expected)
        assert "evil.example" not in str(reply.headers)


@each_path
def test_row_5_large_and_many_headers(server: ServeProgram, path: str) -> None:
    for end, *headers in (
        ("", "x: " + "a" * 100_000),
        ("", *["x: y"] * 1000),
        ("?" + "a" * 100_000,),
        ("/a" * 50_000,),
    ):
        assert refused(ask(server, path + end, *headers)) == 431


ENDS = ("%00", "%ff", "%ed%a0%80", ";x", ".html", "%", "%2500", "/.", "/x%0d%0aX:%20y")
UP = ("../../", "%2e%2e/%2e%2e/", "..%2f..%2f", "..%5c..%5c", "%252e%252e/", "....//")
WITHIN = ("index.html", "vendor", "vendor/manifest.json", "vendor/../app.js", "%2fetc%2fpasswd", "app.js%0a")
ELSEWHERE = (
    *(path + end for path in ("/docs", FILE) for end in ENDS),
    *("/../../etc/passwd", "/%2e%2e/etc/passwd", "/docs/../v1/models", "/docs%2f..%2fv1%2fmodels"),
    *("/DOCS", "/*", "/\\", FOLDER, "/page/", "/page/app.js", "/page/0123456789abcdef/app.js"),
    *(f"{FOLDER}/{name}" for name in (*WITHIN, *(f"{up}routes.py" for up in UP))),
)
NO_PATH = ("/docs/\xff", "docs", "http://localhost", "http://", "http://localhost?x", "")


@pytest.mark.parametrize("target", [*ELSEWHERE, *NO_PATH], ids=lambda target: target.replace(FOLDER, "FOLDER"))
def test_rows_10_24_and_27_other_paths_lead_nowhere(server: ServeProgram, target: str) -> None:
    assert refused(ask(server, target)) == (400 if target in NO_PATH else 404)


@pytest.mark.parametrize("path", PATHS[1:], ids=["docs", "file"])
def test_rows_13_and_14_clients_that_leave_or_never_read(tmp_path: Path, path: str) -> None:
    """They ask for much more than the buffers of their connections take."""
    with ServeProgram(tmp_path, fake=True, EXO_STALL_TIMEOUT="1") as server, ExitStack() as held:
        expected = whole(server, path)
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        connections = [held.enter_context(connect(server)) for _ in range(40)]
        for client in connections:
            client.sendall(f"{GET.format(path)}\r\n".encode() * 500)
            assert client.recv(12) == b"HTTP/1.1 200"
        assert whole(server, path) == expected
        assert process.memory_info().rss - before < 128 << 20
        for client in connections[:20]:
            client.close()
        wait_until(lambda: len([each for each in process.net_connections() if each.status != "LISTEN"]) <= 1)
        assert whole(server, path) == expected
        assert "Traceback" not in server.log.read_text()


def test_rows_15_16_19_and_20_the_page_needs_no_runner(tmp_path: Path) -> None:
    write_cards(tmp_path)
    with ServeProgram(tmp_path, fake=True) as server:
        expected = [whole(server, path) for path in PATHS]
        assert server.complete("good", max_tokens=1).status_code == 200
        runner = psutil.Process(pid(server, "good"))
        for harm in (runner.suspend, runner.kill):
            with suppress(psutil.NoSuchProcess):  # the watchdog may have been faster
                harm()
            assert [whole(server, path) for path in PATHS] == expected
        for _ in range(3):
            assert server.complete("broken").status_code == 503
            assert [whole(server, path) for path in PATHS] == expected


def test_row_18_the_page_holds_up_no_shutdown(tmp_path: Path) -> None:
    """A browser keeps its connection, and another client does not read, while the last stream ends as it would have."""
    write_cards(tmp_path)
    with ServeProgram(tmp_path, fake=True) as server, connect(server) as unread:
        assert whole(server, "/")
        unread.sendall(f"{GET.format(FILE)}\r\n".encode() * 500)
        assert unread.recv(12) == b"HTTP/1.1 200"
        text = stream(server, 200, lambda: server.process.send_signal(signal.SIGTERM))
        assert text == expected_text("hi", 200)
        assert server.process.wait(DEADLINE_SECONDS) == 0


@each_path
def test_row_28_no_other_host_origin_method_or_frame(server: ServeProgram, path: str) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "192.168.1.5", "169.254.169.254", "[::]", ""):
        assert refused(server.client.get(path, headers={**BROWSER, "host": host})) == 403
    preflight = {"access-control-request-method": "GET", "access-control-request-headers": "x-api-key"}
    for origin in ("https://evil.example", "null", "file://", f"{server.url}.evil.example"):
        for method, headers in (("GET", {}), ("OPTIONS", preflight)):
            reply = server.client.request(method, path, headers={**BROWSER, "origin": origin, **headers})
            assert refused(reply) == 403
            assert not [name for name in reply.headers if name.startswith("access-control-")]
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
        assert refused(server.client.request(method, path, headers=BROWSER)) == 405
    reply, head = server.client.get(path, headers=BROWSER), server.client.head(path, headers=BROWSER)
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    assert policy["frame-ancestors"] == policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert {value for name, value in policy.items() if name.endswith("-src")} == {"'none'", "'self'"}
    own = {"x-content-type-options": "nosniff", "cross-origin-resource-policy": "same-origin"}
    assert own.items() <= dict(reply.headers).items()
    assert reply.headers["content-type"].partition(";")[0] == ("text/javascript" if path == FILE else "text/html")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-security-policy"] == reply.headers["content-security-policy"]


def test_row_29_only_the_pages_own_paths_are_open(tmp_path: Path) -> None:
    write_cards(tmp_path)
    closed = ("/docs%0a", "/v1/models", "/openapi.json", "/metrics", "/docs/v1/models", "/ollama/docs", *ELSEWHERE)
    wrong = ("x: y", "x-api-key: ", "Authorization: Bearer ops", f"Cookie: exo-api-key={KEY}")
    with ServeProgram(tmp_path, fake=True, EXO_API_KEY=f"ops:{KEY}") as server:
        for path in ("/", "/docs", "//docs/", *FILES):
            reply = server.client.get(path, headers={**BROWSER, "x-api-key": "wrong"})
            assert reply.status_code == 200
            for secret in (KEY, "test/good", str(tmp_path)):
                assert secret not in reply.text + str(reply.headers)
            assert refused(server.client.post(path)) == 405
        for target in closed:
            assert {refused(ask(server, target, header)) for header in wrong} == {401}, target
        assert KEY not in server.log.read_text()


def test_row_30_a_flood_leaves_a_stream_and_the_history_whole(server: ServeProgram) -> None:
    earlier = server.complete("good", max_tokens=1).headers["x-request-id"]
    expected = {path: whole(server, path) for path in PATHS}

    def flood(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=DEADLINE_SECONDS) as client:
            for at in range(60):
                path = PATHS[(number + at) % len(PATHS)]
                assert client.get(path, headers=BROWSER).content == expected[path]

    with ThreadPoolExecutor(8) as pool:
        text = stream(server, 400, lambda: list(pool.map(flood, range(8))))
    assert text == expected_text("hi", 400)
    assert earlier in {each["id"] for each in server.client.get("/v1/activity?limit=50").json()["requests"]}


@pytest.mark.parametrize("control", ["%0a", "%0d%0a", "%0d", "%e2%80%a8", "%c2%85", "%1b[2J", "%08"])
def test_row_31_a_path_forges_no_line_of_the_log(server: ServeProgram, control: str) -> None:
    for path in PATHS:
        target = f"{path.rstrip('/')}/{control}ERROR:%20forged"
        assert refused(ask(server, target, "User-Agent: x\x85ERROR: forged", f"X-Request-Id: {control}{path}")) == 404
    wait_until(lambda: all(f"(request {control}{path})" in server.log.read_text() for path in PATHS))
    assert not [line for line in server.log.read_text().splitlines() if line.startswith("ERROR: forged")]
    assert not set("\x1b\x08\x85\r") & set(server.log.read_text())
