"""Streams that wait, fail or lose their client; and requests whose client leaves."""

import json
import socket
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.conftest import fake_card
from tests.support.api_server import serve

MODEL = "fake/model"
ENDLESS = {"model": MODEL, "prompt": "hi", "ignore_eos": True}
SHORT = {"model": MODEL, "prompt": "hi", "max_tokens": 3}


def open_gate(gate: Path) -> None:
    gate.open("wb").close()


@pytest.fixture
def grace(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how long a stream waits before it opens."""
    return lambda seconds: monkeypatch.setattr("exo.api.http.response.GRACE_SECONDS", seconds)


@contextmanager
def server(directory: Path, **table: object) -> Generator[httpx.Client]:
    with (
        serve(directory, fake_card(MODEL).model_copy(update={"engines": {"cuda": table}})) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        yield http


@contextmanager
def stream(http: httpx.Client, body: Mapping[str, object]) -> Generator[Iterator[str]]:
    """The lines of a stream that are not empty."""
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "text/event-stream"
        assert reply.headers["x-exo-runner"] == "cuda"
        yield (line for line in reply.iter_lines() if line)


def text_of(lines: Iterator[str]) -> str:
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_progress_of_a_load_comes_as_comments(tmp_path: Path, gate: Path, grace: Callable[[float], None]) -> None:
    grace(0)
    with server(tmp_path, load_gate=str(gate), load_steps=3) as http, stream(http, SHORT) as lines:
        comments = [next(lines)]
        while comments[-1] != ": loading 2/3":
            comments.append(next(lines))
        open_gate(gate)
        rest = list(lines)
    assert all(comment.startswith(": ") for comment in comments)
    assert len(set(comments)) == len(comments)
    assert rest[-1] == "data: [DONE]"
    assert len(text_of(line for line in rest if line.startswith("data: "))) == 3


def test_a_long_silence_is_filled(
    tmp_path: Path, gate: Path, grace: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    grace(0)
    monkeypatch.setattr("exo.api.http.sse.KEEP_ALIVE_SECONDS", 0.05)
    with server(tmp_path, load_gate=str(gate)) as http, stream(http, SHORT) as lines:
        assert ": keep-alive" in lines
        assert ": keep-alive" in lines
        open_gate(gate)
        assert "data: [DONE]" in lines


def test_a_model_that_loads_soon_needs_no_comments(tmp_path: Path, grace: Callable[[float], None]) -> None:
    grace(60)
    with server(tmp_path) as http, stream(http, SHORT) as lines:
        seen = list(lines)
    assert not [line for line in seen if not line.startswith("data: ")]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_load_that_fails_soon_is_an_http_error(
    tmp_path: Path, grace: Callable[[float], None], streamed: bool
) -> None:
    grace(60)
    with server(tmp_path, fail_load="the weights are torn") as http:
        reply = http.post("/v1/completions", json={**SHORT, "stream": streamed})
        assert reply.status_code == 503
        assert reply.json()["error"] == {
            "message": "the weights are torn",
            "type": "server_error",
            "param": None,
            "code": "model_load_failed",
        }
        assert reply.headers["x-exo-runner"] == "cuda"
        assert reply.headers["x-should-retry"] == "false"
        assert http.get("/health").status_code == 200


def test_a_load_that_fails_late_is_an_error_in_the_stream_without_done(
    tmp_path: Path, gate: Path, grace: Callable[[float], None]
) -> None:
    grace(0)
    with server(tmp_path, load_gate=str(gate), fail_load="the weights are torn") as http, stream(http, SHORT) as lines:
        next(lines)
        open_gate(gate)
        *comments, last = list(lines)
    assert all(comment.startswith(": ") for comment in comments)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "model_load_failed"


def test_a_runner_that_dies_ends_its_stream_with_an_error_and_no_done(tmp_path: Path) -> None:
    with server(tmp_path, die_at=3) as http:
        with stream(http, ENDLESS) as lines:
            *chunks, last = list(lines)
        assert len(text_of(chunk for chunk in chunks if chunk.startswith("data: "))) == 3
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "runner_died"
        assert "restarted repeatedly without progress" in error["message"]
        assert "SIGKILL" in error["message"]
        assert "the fake runner dies as ordered" in error["message"]
        reply = http.post("/v1/completions", json={**ENDLESS, "n": 2})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "runner_died")
        assert int(reply.headers["retry-after"]) >= 1


# In what follows the model has one slot and its replies never end: a short request is answered only if the requests
# before it were cancelled.
ONE_SLOT = {"slots": 1, "n_ctx": 1_000_000_000, "step_seconds": 0.001}


def is_answered(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json=SHORT).status_code == 200


def test_leaving_a_stream_frees_its_slot(tmp_path: Path) -> None:
    with server(tmp_path, **ONE_SLOT) as http:
        with stream(http, ENDLESS) as lines:
            next(lines)
        is_answered(http)


def test_leaving_several_choices_frees_all_their_slots(tmp_path: Path) -> None:
    with server(tmp_path, **{**ONE_SLOT, "slots": 3}) as http:
        with stream(http, {**ENDLESS, "n": 3}) as lines:
            next(lines)
        reply = http.post("/v1/completions", json={**SHORT, "n": 3})
        assert [len(choice["text"]) for choice in reply.json()["choices"]] == [3, 3, 3]


def test_leaving_the_queue_keeps_the_slot_for_others(tmp_path: Path, grace: Callable[[float], None]) -> None:
    grace(60)
    with server(tmp_path, **ONE_SLOT) as http:
        with stream(http, ENDLESS) as running:
            next(running)
            with stream(http, ENDLESS):
                pass  # open, so it has been accepted, and waits for the slot
            next(running)
        is_answered(http)


def test_leaving_during_a_load_cancels_and_the_load_goes_on(
    tmp_path: Path, gate: Path, grace: Callable[[float], None]
) -> None:
    grace(0)
    with server(tmp_path, load_gate=str(gate), **ONE_SLOT) as http:
        with stream(http, ENDLESS) as lines:
            next(lines)
        open_gate(gate)
        is_answered(http)


def test_leaving_without_a_stream_cancels_too(tmp_path: Path) -> None:
    with server(tmp_path, **ONE_SLOT) as http:
        is_answered(http)
        body = json.dumps(ENDLESS).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection((http.base_url.host, http.base_url.port or 0)) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            with stream(http, ENDLESS):
                pass  # accepted behind the other
        is_answered(http)
