"""Who gets past the door: keys on every route, host names, web origins."""

from collections.abc import Generator
from pathlib import Path

import httpx
import pytest

from exo.config import Access, ApiKey
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve

MODEL = "fake/model"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
KEYS = (ApiKey("alice", "alice's-secret"), ApiKey("bob", "bob-has-another"))
PAGE = "https://page.example"


OPEN = [("GET", "/health"), ("GET", "/health/"), ("GET", "//health"), ("GET", "//health//")]
"""What needs no key, as clients may write it."""


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    """A server with two keys, which pages of one origin may use."""
    access = Access(keys=KEYS, cors_origins=(PAGE,), allowed_hosts=("exo.lan",))
    card = fake_card(MODEL, chat_template=CHAT_TEMPLATE)
    with (
        serve(tmp_path_factory.mktemp("server"), card, access=access) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def unlocked(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    """A server as it is by default."""
    card = fake_card(MODEL, chat_template=CHAT_TEMPLATE)
    with serve(tmp_path_factory.mktemp("server"), card) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def error(reply: httpx.Response) -> tuple[int, str]:
    assert reply.json()["error"]["type"] == "invalid_request_error"
    return reply.status_code, reply.json()["error"]["code"]


def routes(http: httpx.Client) -> list[tuple[str, str]]:
    """Every route of the server's own document, and some that are in none."""
    document = http.get("/openapi.json", headers={"x-api-key": KEYS[0].key}).json()
    described = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    assert len(described) >= 6
    hidden = [
        ("GET", "/redoc"),
        ("GET", "/openapi.json"),
        ("GET", "/page"),
        ("GET", "/page/app.js"),
        ("POST", "/page/"),
        ("GET", "/docs/oauth2-redirect"),
    ]
    unknown = [("POST", "/v1/embeddings"), *OPEN, ("GET", "/HEALTH"), ("GET", "//health//x")]
    methods = [("PUT", "/v1/models"), ("DELETE", "/health/x"), ("OPTIONS", "/v1/chat/completions")]
    methods.append(("HEAD", "/openapi.json"))
    return [*described, *hidden, *unknown, *methods]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong-key"},
        {"authorization": "Bearer"},
        {"authorization": "Basic alice's-secret"},
        {"authorization": "alice's-secret"},
        {"authorization": "Bearer alice's-secret2"},
        {"authorization": "Bearer alice's-secre"},
        {"authorization": "Bearer alice:alice's-secret"},
        {"x-api-key": "alice"},
        {"x-api-key": ""},
        {"x-api-key": "\xff\xfe"},
        {"cookie": "x-api-key=alice's-secret"},
    ],
)
def test_every_route_but_health_needs_a_key(locked: httpx.Client, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    root = str(locked.base_url).rstrip("/")  # httpx takes the beginning of "//health" for a host
    for method, path in routes(locked):
        if (method, path) not in OPEN:
            reply = locked.request(method, f"{root}{path}", headers=raw)
            assert reply.status_code == 401, (method, path)
            assert reply.headers["www-authenticate"].startswith("Bearer")
            if path.startswith("/v1/messages"):
                assert reply.json()["error"]["type"] == "authentication_error"
            elif path.startswith("/api/"):
                assert "key" in reply.json()["error"]
            elif method != "HEAD":
                assert error(reply) == (401, "invalid_api_key")
    for method, path in OPEN:
        assert locked.request(method, f"{root}{path}", headers=raw).json() == {"status": "ok"}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
@pytest.mark.parametrize(
    ("name", "form"), [("authorization", "Bearer {}"), ("authorization", "bearer {}"), ("x-api-key", "{}")]
)
def test_each_key_opens_in_either_header(locked: httpx.Client, key: ApiKey, name: str, form: str) -> None:
    headers = {name: form.format(key.key)}
    assert locked.get("/v1/models", headers=headers).status_code == 200
    assert locked.post("/v1/chat/completions", json=ASK, headers=headers).status_code == 200
    assert locked.get("/v1/nothing", headers=headers).status_code == 404


def test_a_key_is_in_no_reply_and_no_description_of_itself(locked: httpx.Client) -> None:
    replies = [locked.get("/v1/models"), locked.get("/v1/models", headers={"x-api-key": "alice's-secret2"})]
    shown = [repr(KEYS), repr(Access(keys=KEYS)), *(reply.text + str(reply.headers) for reply in replies)]
    assert not [text for text in shown for key in KEYS if key.key in text]


def test_a_refused_body_is_not_read(locked: httpx.Client) -> None:
    assert error(locked.post("/v1/chat/completions", content=b"{" * 100_000)) == (401, "invalid_api_key")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.9.9.9:80", "[::1]:52415", "localhost."])
def test_loopbacks_names_are_accepted(unlocked: httpx.Client, host: str) -> None:
    assert unlocked.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:52415",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "127.0.0.1@evil.example",
        "127.0.0.1, evil.example",
        "0.0.0.0",
        "192.168.1.5",
        "169.254.169.254",
        "[::]",
        "[::1",
        "127.1",
        "2130706433",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/docs", "/nothing"])
def test_another_host_name_is_refused(unlocked: httpx.Client, host: str, path: str) -> None:
    assert error(unlocked.get(path, headers={"host": host})) == (403, "host_not_allowed")


def test_an_allowed_host_is_accepted_besides(locked: httpx.Client) -> None:
    for host, status in (("exo.lan:80", 200), ("EXO.LAN", 200), ("localhost", 200), ("lan", 403), ("x.exo.lan", 403)):
        assert locked.get("/health", headers={"host": host}).status_code == status


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:1", "null", "file://", "", PAGE])
def test_a_page_of_another_origin_is_refused(unlocked: httpx.Client, origin: str) -> None:
    for reply in (
        unlocked.post("/v1/chat/completions", json=ASK, headers={"origin": origin}),
        unlocked.get("/v1/models", headers={"origin": origin}),
        unlocked.options("/v1/chat/completions", headers={"origin": origin, "access-control-request-method": "POST"}),
    ):
        assert error(reply) == (403, "origin_not_allowed")
        assert not [name for name in reply.headers if name.startswith("access-control-")]


def test_the_servers_own_pages_may_use_it(unlocked: httpx.Client) -> None:
    own = f"http://{unlocked.base_url.host}:{unlocked.base_url.port}"
    reply = unlocked.post("/v1/chat/completions", json=ASK, headers={"origin": own})
    assert reply.status_code == 200
    assert "access-control-allow-origin" not in reply.headers


def test_a_listed_origin_is_shared_with_but_never_with_credentials(locked: httpx.Client) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-stainless-os"}
    preflight = locked.options("/v1/chat/completions", headers={"origin": PAGE, **asked})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    reply = locked.post("/v1/chat/completions", json=ASK, headers={"origin": PAGE, "x-api-key": KEYS[0].key})
    assert reply.status_code == 200
    refused = locked.get("/v1/models", headers={"origin": PAGE})
    assert refused.status_code == 401
    for shared in (reply, refused):
        assert shared.headers["access-control-allow-origin"] == PAGE
    for each in (preflight, reply, refused):
        assert "access-control-allow-credentials" not in each.headers
    assert "origin" in reply.headers["vary"].lower()
    other = locked.get("/v1/models", headers={"origin": PAGE + ".evil.example", "x-api-key": KEYS[0].key})
    assert error(other) == (403, "origin_not_allowed")


def test_a_preflight_allows_the_methods_that_exist(locked: httpx.Client) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "DELETE"}
    allowed = locked.options("/api/delete", headers=asked).headers["access-control-allow-methods"].split(", ")
    assert {method for method, _ in routes(locked)} - {"PUT", "OPTIONS"} == set(allowed)


def test_any_origin_if_asked_for_still_without_credentials(tmp_path: Path) -> None:
    with serve(tmp_path, fake_card(MODEL), access=Access(cors_origins=("*",))) as url:
        for origin in (PAGE, "null"):
            reply = httpx.get(f"{url}/v1/models", headers={"origin": origin}, timeout=60)
            assert reply.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in reply.headers
