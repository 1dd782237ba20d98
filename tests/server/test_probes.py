"""What clients try before and around their requests: HEAD, other spellings of paths, types and encodings of bodies."""

import gzip
import json
import zlib
from collections.abc import Generator
from pathlib import Path

import gguf
import httpx
import pytest

from exo import __version__
from exo.api.http.body import BODY_LIMIT
from exo.config import Access
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve

MODEL = "fake/model"
TOOLS_TEMPLATE = CHAT_TEMPLATE + "{% if tools %}<tools>{{ tools | tojson }}</tools> <tool_call>{% endif %}"
CHAT: dict[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}
REQUESTS: dict[str, dict[str, object]] = {
    "/v1/completions": {"model": MODEL, "prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": {**CHAT, "max_tokens": 2},
    "/v1/responses": {"model": MODEL, "input": "hi", "max_output_tokens": 2},
    "/v1/messages": {**CHAT, "max_tokens": 2},
    "/v1/messages/count_tokens": CHAT,
    "/api/chat": {**CHAT, "options": {"num_predict": 2}},
    "/api/generate": {"model": MODEL, "prompt": "hi", "options": {"num_predict": 2}},
    "/api/show": {"model": MODEL},
    "/tokenize": {"model": MODEL, "content": "hi"},
}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    directory = tmp_path_factory.mktemp("server")
    card = fake_card(MODEL, chat_template=TOOLS_TEMPLATE, n_ctx=1 << 20)
    with serve(directory, card) as url, httpx.Client(base_url=url, timeout=120) as client:
        assert client.post("/v1/completions", json=REQUESTS["/v1/completions"]).status_code == 200
        yield client


def test_head_is_answered_like_get_on_every_route(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()["paths"]
    paths = [path for path, methods in document.items() if "get" in methods and "{" not in path]
    assert {"/health", "/ready", "/api/tags", "/api/version", "/v1/models"} <= set(paths)
    paths.remove("/v1/activity/events")  # a stream without an end
    for path in [*paths, "/", "/docs", "/openapi.json", f"/v1/models/{MODEL}", "/v1/models/none", "/nothing"]:
        query = {"model": MODEL} if path == "/v1/route" else {}
        reply, head = http.get(path, params=query), http.head(path, params=query)
        assert head.status_code == reply.status_code, path
        assert head.headers["content-type"] == reply.headers["content-type"]
        assert head.content == b""
    assert http.head("/v1/completions").status_code == 405


@pytest.mark.parametrize("spelling", ["{}/", "/{}", "//{}//", "{}///"])
def test_slashes_that_mean_nothing_find_the_route(http: httpx.Client, spelling: str) -> None:
    for path in ("/health", "/v1/models", "/api/tags", "/docs", "/v1/models/fake//model"):
        assert http.get(httpx.URL(str(http.base_url).rstrip("/") + spelling.format(path))).status_code == 200, path
    for path, body in REQUESTS.items():
        middle = "/" + path.strip("/").replace("/", "//")
        for each in (spelling.format(path), spelling.format(middle)):
            assert http.post(httpx.URL(str(http.base_url).rstrip("/") + each), json=body).status_code == 200, each


def test_an_error_on_another_spelling_is_in_the_envelope_of_its_api(http: httpx.Client) -> None:
    base = str(http.base_url).rstrip("/")
    assert "error" in http.post(f"{base}//v1//messages/", json={}).json()["error"]["type"]
    assert isinstance(http.post(f"{base}//api/chat/", json={}).json()["error"], str)
    host = {"host": "evil.example"}
    assert isinstance(http.get(f"{base}//api/tags", headers=host).json()["error"], str)


@pytest.mark.parametrize("path", REQUESTS)
def test_a_body_of_unstated_type_is_read_outside_browsers(http: httpx.Client, path: str) -> None:
    body = json.dumps(REQUESTS[path]).encode()
    for headers in ({}, {"content-type": "application/octet-stream"}):
        assert http.post(path, content=body, headers=headers).status_code == 200


@pytest.mark.parametrize("sign", [{"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "none"}, {"origin": "{}"}])
@pytest.mark.parametrize("media_type", [None, "application/octet-stream", "text/plain"])
def test_a_browser_has_to_state_json(http: httpx.Client, sign: dict[str, str], media_type: str | None) -> None:
    own = str(http.base_url).rstrip("/")
    headers = {name: value.format(own) for name, value in sign.items()}
    headers |= {"content-type": media_type} if media_type else {}
    reply = http.post("/v1/completions", content=b"{}", headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert http.post("/v1/completions", content=b"{}", headers={**headers, **JSON}).status_code == 400


def raw_deflate(data: bytes) -> bytes:
    packing = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packing.compress(data) + packing.flush()


@pytest.mark.parametrize("path", REQUESTS)
def test_a_packed_body_is_unpacked(http: httpx.Client, path: str) -> None:
    body = json.dumps(REQUESTS[path]).encode()
    for encoding, content in {
        "identity": body,
        "": body,
        "gzip": gzip.compress(body, mtime=0),
        "X-GZIP": gzip.compress(body, mtime=0),
        "identity, gzip": gzip.compress(body, mtime=0),
        "deflate": zlib.compress(body),
        "Deflate": raw_deflate(body),
    }.items():
        reply = http.post(path, content=content, headers={**JSON, "content-encoding": encoding})
        assert reply.status_code == 200, (encoding, reply.text)


@pytest.mark.parametrize(
    ("encoding", "content", "status", "code"),
    [
        ("br", b"{}", 415, "unsupported_media_type"),
        ("zstd", b"{}", 415, "unsupported_media_type"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), 415, "unsupported_media_type"),
        ("gzip", b"{}", 400, "invalid_encoding"),
        ("gzip", b"", 400, "invalid_encoding"),
        ("gzip", gzip.compress(b"{}", mtime=0)[:-4], 400, "invalid_encoding"),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"{}", 400, "invalid_encoding"),
        ("gzip", gzip.compress(b"{}", mtime=0) * 200_000, 400, "invalid_encoding"),
        ("deflate", b"\x78", 400, "invalid_encoding"),
        ("deflate", zlib.compress(b"{}" * 100)[:10], 400, "invalid_encoding"),
        ("gzip", gzip.compress(b"{}", mtime=0), 400, "missing_parameter"),
        ("gzip", gzip.compress(b" " * (BODY_LIMIT + 1), 1, mtime=0), 413, "request_too_large"),
        ("deflate", zlib.compress(bytes(256 << 20), 1), 413, "request_too_large"),
        ("gzip", b" " * (BODY_LIMIT + 1), 413, "request_too_large"),
    ],
)
def test_a_packed_body_that_is_none_or_too_large(
    http: httpx.Client, encoding: str, content: bytes, status: int, code: str
) -> None:
    reply = http.post("/v1/completions", content=content, headers={**JSON, "content-encoding": encoding})
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    if status == 415:
        assert reply.headers["accept-encoding"] == "gzip, deflate"
        assert encoding in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"model":"fake/model","prompt":[' + b"[]," * 5_000_000 + b"[]]}",
        b'{"model":"fake/model","prompt":[' + b"1," * 8_000_000 + b"1]}",
        b"{" + b",".join(b'"x%d":1' % number for number in range(1_000_000)) + b"}",
    ],
    ids=["lists", "numbers", "fields"],
)
def test_a_body_that_would_take_seconds_to_validate_is_refused(http: httpx.Client, content: bytes) -> None:
    """While it is validated, no other request is served."""
    reply = http.post("/v1/completions", content=content, headers=JSON)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")


def test_large_bodies_of_text_and_of_a_million_tokens_are_accepted(http: httpx.Client) -> None:
    text = 'a, "b": [{\\' * 1_000_000
    reply = http.post("/v1/completions", json={"model": MODEL, "prompt": text, "max_tokens": 1})
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    tokens = [1] * 1_000_000
    reply = http.post("/v1/completions", json={"model": MODEL, "prompt": tokens, "max_tokens": 1, "temperature": -1})
    assert reply.json()["error"]["param"] == "temperature"


def test_hundreds_of_tools_are_accepted(http: httpx.Client) -> None:
    names = [f"tool_{number}" for number in range(600)]
    schema = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    functions = [{"name": name, "description": "does", "parameters": schema} for name in names]
    openai = [{"type": "function", "function": function} for function in functions]
    anthropic = [{"name": name, "description": "does", "input_schema": schema} for name in names]
    for path, tools in {
        "/v1/chat/completions": openai,
        "/v1/responses": [{"type": "function", **function} for function in functions],
        "/v1/messages": anthropic,
        "/v1/messages/count_tokens": anthropic,
        "/api/chat": openai,
    }.items():
        reply = http.post(path, json={**REQUESTS[path], "tools": tools})
        assert reply.status_code == 200, (path, reply.text)


def test_a_page_on_this_machine_is_let_in_where_its_origin_is_listed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """By default it is not (docs/api.md): any program of this machine, and whatever it shows, has such an origin."""
    page = "http://localhost:3000"
    asked = {"origin": page, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    with serve(tmp_path_factory.mktemp("listed"), fake_card(), access=Access(cors_origins=(page,))) as url:
        for path in REQUESTS:
            for spelling in (path, path + "/"):
                preflight = httpx.options(url + spelling, headers=asked, timeout=60)
                assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (204, page)
        assert (
            httpx.options(f"{url}/api/chat", headers={**asked, "origin": "http://localhost:1"}, timeout=60).status_code
            == 403
        )


THINKING_TOOLS = "{% for tool in tools %}<tool_call>{% endfor %}{% if enable_thinking %}<think></think>{% endif %}"


def write_header(path: Path, template: str | None) -> None:
    """The metadata of a GGUF file, behind a long vocabulary, and no weights."""
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(3)
    writer.add_embedding_length(64)
    writer.add_context_length(40_960)
    writer.add_token_list([f"token {number}" for number in range(200_000)])
    if template is not None:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    """A server whose cards have files, none of which is loaded."""
    directory = tmp_path_factory.mktemp("models")
    write_header(directory / "thinks.gguf", THINKING_TOOLS)
    write_header(directory / "plain.gguf", None)
    (directory / "broken.gguf").write_bytes(b"GGUF" + bytes(30))
    folder = directory / "folder"
    folder.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(THINKING_TOOLS)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(8))
    cards = [
        fake_card(f"me/{name}", path=str(directory / f"{name}.gguf")).model_copy(update={"aliases": (name,)})
        for name in ("thinks", "plain", "broken", "missing")
    ]
    in_folder = fake_card("me/folder").model_copy(
        update={"backends": ("MlxCpu",), "engines": {"mlx": {"path": str(folder)}}}
    )
    with serve(directory, *cards, in_folder) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.mark.parametrize(
    ("model", "architecture", "context_length", "capabilities"),
    [
        ("me/thinks", "qwen3", 40_960, ["completion", "tools", "thinking"]),
        ("me/plain", "qwen3", 40_960, ["completion"]),
        ("me/folder", "llama", 2048, ["completion", "tools", "thinking"]),
        ("me/broken", "model", 4096, ["completion"]),
        ("me/missing", "model", 4096, ["completion"]),
    ],
)
def test_show_tells_of_a_custom_model_what_its_files_say(
    on_disk: httpx.Client, model: str, architecture: str, context_length: int, capabilities: list[str]
) -> None:
    shown = on_disk.post("/api/show", json={"model": model}).json()
    info = shown["model_info"]
    assert info["general.architecture"] == architecture
    assert info[f"{architecture}.context_length"] == context_length
    assert shown["capabilities"] == capabilities
    assert shown["template"] == (THINKING_TOOLS if "tools" in capabilities else "")


def test_aliases_are_listed_and_shown_like_their_models(on_disk: httpx.Client) -> None:
    listed = {model["name"]: model for model in on_disk.get("/api/tags").json()["models"]}
    assert {"me/thinks", "thinks", "me/folder", "plain"} <= set(listed)
    assert listed["thinks"] == {**listed["me/thinks"], "name": "thinks", "model": "thinks"}
    by_id, by_alias = (on_disk.post("/api/show", json={"model": name}).json() for name in ("me/thinks", "thinks"))
    assert by_alias == by_id


def test_the_version_is_one_that_clients_of_ollama_accept(http: httpx.Client) -> None:
    told = http.get("/api/version").json()
    assert [int(part) for part in told["version"].split(".")] >= [0, 13, 4]
    assert told["exo"] == __version__
