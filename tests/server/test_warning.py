"""What has no effect is told in the reply's header and once in the log; a strict server refuses unknown fields."""

import json
import logging
from collections.abc import Generator

import httpx
import pytest

from exo.api.http.middleware import WARNING_HEADER
from exo.config import Settings
from exo.config_values import SettingsError
from exo.serving.warnings import MAX_WARNINGS
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve

MODEL = "fake/model"
CARD = fake_card(MODEL).model_copy(update={"engines": {"cuda": {"chat_template": CHAT_TEMPLATE}}})
MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 3},
    "/v1/completions": {"prompt": "hi", "max_tokens": 3},
    "/v1/responses": {"input": "hi", "max_output_tokens": 3},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/api/chat": {"messages": MESSAGES, "options": {"num_predict": 3}},
    "/api/generate": {"prompt": "hi", "options": {"num_predict": 3}},
    "/api/show": {},
    "/tokenize": {"content": "hi"},
    "/apply-template": {"messages": MESSAGES},
}
STREAMS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat", "/api/generate"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    with serve(tmp_path_factory.mktemp("lenient"), CARD) as url:
        yield url


@pytest.fixture(scope="module")
def strict_url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    with serve(tmp_path_factory.mktemp("strict"), CARD, strict=True) as url:
        yield url


def ask(url: str, path: str, **fields: object) -> httpx.Response:
    return httpx.post(url + path, json={"model": MODEL, **BODIES[path], **fields}, timeout=60)


@pytest.mark.parametrize("path", BODIES)
def test_a_typo_is_told_in_every_dialect(url: str, path: str) -> None:
    reply = ask(url, path, modle="x")
    assert reply.status_code == 200, reply.text
    assert reply.headers[WARNING_HEADER] == "modle: there is no such field, so it has no effect (did you mean model?)"


@pytest.mark.parametrize("path", BODIES)
def test_a_strict_server_refuses_it(strict_url: str, path: str) -> None:
    reply = ask(strict_url, path, modle="x")
    assert reply.status_code == 400
    assert "modle: there is no such field; did you mean model?" in reply.text


def test_a_strict_server_names_the_place(strict_url: str) -> None:
    reply = ask(strict_url, "/v1/chat/completions", messages=[*MESSAGES, {**MESSAGES[0], "contents": "x"}])
    assert reply.json()["error"]["param"] == "messages.1.contents"


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_tells_it_too(url: str, path: str) -> None:
    reply = ask(url, path, stream=True, modle="x")
    assert reply.status_code == 200
    assert reply.headers[WARNING_HEADER].startswith("modle: there is no such field")


def test_an_error_tells_it_too(url: str) -> None:
    reply = ask(url, "/v1/completions", temperatur=1, top_p=7)
    assert reply.json()["error"]["param"] == "top_p"
    late = ask(url, "/v1/completions", model="nobody/nothing", temperatur=1)
    assert (late.status_code, late.headers[WARNING_HEADER][:11]) == (404, "temperatur:")


def test_what_asks_for_nothing_unknown_gets_no_warning(url: str) -> None:
    for path in BODIES:
        assert WARNING_HEADER not in ask(url, path).headers


def test_the_place_is_named_once_without_indices(url: str) -> None:
    odd = [{**MESSAGES[0], "mood": "fine", "weather": "rain"}] * 3
    reply = ask(url, "/v1/chat/completions", messages=odd, stream_options={"includ_usage": True}, stream=True)
    texts = reply.headers[WARNING_HEADER].split("; ")
    assert sorted(text.partition(": ")[0] for text in texts) == [
        "messages.mood",
        "messages.weather",
        "stream_options.includ_usage",
    ]
    assert "(did you mean include_usage?)" in reply.headers[WARNING_HEADER]


def test_the_header_is_bounded_and_printable(url: str) -> None:
    many = {f"field{number}\r\nx-evil: 1é{'y' * 100}": 1 for number in range(1000)}
    reply = ask(url, "/v1/completions", **many)
    assert reply.status_code == 200
    assert "x-evil" not in reply.headers
    assert len(reply.headers[WARNING_HEADER]) < 2100
    assert "and " in reply.headers[WARNING_HEADER].rpartition("; ")[2]
    assert reply.headers[WARNING_HEADER].count("no such field") <= MAX_WARNINGS


def test_a_field_is_logged_once(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "exo.serving.warnings"):
        for _ in range(3):
            ask(url, "/v1/completions", only_here=1)
    assert [record.getMessage() for record in caplog.records] == [
        "/v1/completions: only_here: there is no such field, so it has no effect"
    ]


def test_requests_beside_each_other_keep_their_warnings_apart(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        first = client.post("/v1/completions", json={"model": MODEL, **BODIES["/v1/completions"], "one": 1})
        second = client.post("/v1/completions", json={"model": MODEL, **BODIES["/v1/completions"], "two": 1})
    assert (first.headers[WARNING_HEADER][:4], second.headers[WARNING_HEADER][:4]) == ("one:", "two:")


def test_strict_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Settings.load().strict
    assert Settings.load(strict=True).strict
    monkeypatch.setenv("EXO_STRICT", "1")
    assert Settings.load().strict
    monkeypatch.setenv("EXO_STRICT", "perhaps")
    with pytest.raises(SettingsError, match="EXO_STRICT: expected true or false"):
        Settings.load()


def test_a_pull_is_not_made_on_a_guess(url: str) -> None:
    reply = httpx.post(f"{url}/v1/models/pull", json={"model": MODEL, "quantization": "Q8_0"}, timeout=60)
    assert json.loads(reply.text)["error"]["code"] == "unknown_parameter"


def test_a_body_that_is_read_beside_the_event_loop_tells_it_too(url: str) -> None:
    long = [{"role": "user", "content": "x" * (200 << 10)}]
    reply = ask(url, "/v1/chat/completions", messages=long, modle="x")
    assert (reply.status_code, reply.headers[WARNING_HEADER][:6]) == (400, "modle:")
