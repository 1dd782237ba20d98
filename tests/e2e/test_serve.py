"""``exo serve`` with the llama.cpp runner on tiny models: one path through the house, and what goes wrong on it."""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import JsonValue

from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf
from tests.support.twins import FLOAT32

TABLE: dict[str, JsonValue] = {**FLOAT32, "slots": 4, "n_ctx": 2048}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    good = home / "good.gguf"
    write_gguf(good, Shape())
    whole = good.read_bytes()
    (home / "truncated.gguf").write_bytes(whole[: len(whole) // 2])
    (home / "header-only.gguf").write_bytes(whole[:100])
    (home / "picture.gguf").write_bytes(b"\x89PNG\r\n" + bytes(1000))
    for name in ("good", "truncated", "header-only", "picture", "missing"):
        write_card(home, name, {"cuda": {**TABLE, "path": str(home / f"{name}.gguf")}})
    engines: dict[str, dict[str, JsonValue]] = {
        "cuda": {**TABLE, "path": str(home / "picture.gguf")},
        "mlx": {"repo": "someone/folder"},
    }
    write_card(home, "picture-or-folder", engines, backends=["LlamaCppCpu", "MlxCpu"])
    write_card(home, "misspelt", {"cuda": {**TABLE, "path": str(good), "n_gpu_layer": 3}})
    write_card(home, "lonely", {"cuda": {**TABLE, "path": str(good)}}, backends=["LlamaCppCuda"])
    write_card(home, "broken", {"cuda": {"path": str(good)}}, n_layers="many")
    with ServeProgram(home) as program:
        yield program


def error_of(reply: httpx.Response) -> dict[str, str]:
    """The body's, or that of a stream's last event."""
    events = reply.text.split("\n\n") if reply.headers["content-type"].startswith("text/event-stream") else []
    last = next((event for event in reversed(events) if event.startswith("data: ")), reply.text)
    return json.loads(last.removeprefix("data: "))["error"]


def test_a_model_loads_on_its_first_request_and_the_reply_says_who_served_it(server: ServeProgram) -> None:
    reply = server.complete("good", max_tokens=8, temperature=0)
    assert reply.status_code == 200
    assert reply.json()["usage"]["completion_tokens"] == 8
    assert reply.headers["x-exo-runner"] == "cuda"
    assert "LlamaCppCpu" in reply.headers["x-exo-route"]
    assert server.client.get("/ready").json()["models"] == ["test/good"]


def test_openais_client_chats_and_streams(server: ServeProgram) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", _strict_response_validation=True)
    with client:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello world"}]
        whole = client.chat.completions.create(
            model="good", messages=messages, max_tokens=20, temperature=1, seed=3, extra_body={"ignore_eos": True}
        )
        chunks = list(
            client.chat.completions.create(
                model="good",
                messages=messages,
                max_tokens=20,
                temperature=1,
                seed=3,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert whole.choices[0].finish_reason == "length"


def test_the_same_seed_gives_the_same_text_in_a_crowd(server: ServeProgram) -> None:
    alone = server.complete("good", seed=11, max_tokens=40).json()["choices"][0]["text"]

    def ask(index: int) -> httpx.Response:
        return server.complete("good", seed=11 if index == 9 else index, max_tokens=40)

    with ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(ask, range(16)))
    assert all(reply.status_code == 200 for reply in crowd)
    assert crowd[9].json()["choices"][0]["text"] == alone
    assert len({reply.json()["choices"][0]["text"] for reply in crowd}) > 10


@pytest.mark.parametrize(
    ("model", "status", "code", "says"),
    [
        ("missing", 404, "model_not_found", "missing.gguf"),
        ("truncated", 503, "model_load_failed", "truncated.gguf"),
        ("header-only", 503, "model_load_failed", "header-only.gguf"),
        ("picture", 503, "model_load_failed", "not a GGUF"),
        ("picture-or-folder", 503, "model_load_failed", "not a GGUF"),
        ("misspelt", 400, "model_misconfigured", "n_gpu_layer"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_cannot_load_says_why_and_harms_no_other(
    server: ServeProgram, model: str, status: int, code: str, says: str, stream: bool
) -> None:
    reply = server.complete(model, stream=stream)
    error = error_of(reply)
    has_begun = stream and reply.status_code == 200  # as it has where loading took a while
    assert (status if has_begun else reply.status_code, error["code"]) == (status, code)
    assert says in error["message"]
    assert server.complete("good", max_tokens=1).status_code == 200


def test_a_model_that_nothing_here_can_serve_is_refused_with_the_reason(server: ServeProgram) -> None:
    reply = server.complete("lonely")
    assert reply.status_code == 503
    assert "LlamaCppCuda" in error_of(reply)["message"]
    assert "no device" in error_of(reply)["message"]


def test_a_broken_card_is_reported_and_the_others_load(server: ServeProgram) -> None:
    said = server.log.read_text()
    assert "broken.toml" in said
    assert "n_layers" in said
    listed = {model["id"] for model in server.client.get("/v1/models").json()["data"]}
    assert "test/good" in listed
    assert "google/gemma-3-270m" in listed
    assert "test/broken" not in listed


def test_a_prompt_longer_than_the_context_is_the_clients_error(server: ServeProgram) -> None:
    reply = server.complete("good", prompt=[65] * 2048)
    assert (reply.status_code, error_of(reply)["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 2048 tokens" in error_of(reply)["message"]
    assert server.complete("good", prompt=[65] * 2047).json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"prompt": [10**9]}, "prompt"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop": [5]}, "stop"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_wrong_values_are_refused_by_name(server: ServeProgram, body: dict[str, object], param: str) -> None:
    reply = server.complete("good", **body)
    assert reply.status_code == 400
    assert (error_of(reply)["param"] or "").startswith(param)
    assert server.complete("good", max_tokens=1).status_code == 200


def test_a_client_that_leaves_gives_its_slot_back(server: ServeProgram) -> None:
    """With all four slots taken by streams that nobody reads to the end, the next request is still answered."""
    for _ in range(3):
        streams = [
            server.client.stream(
                "POST", "/v1/completions", json={"model": "good", "prompt": "x", "stream": True, "ignore_eos": True}
            )
            for _ in range(4)
        ]
        for stream in streams:
            with stream as reply:
                assert next(reply.iter_lines()).startswith("data: ")
    assert server.complete("good", max_tokens=4).status_code == 200


def test_no_runner_outlives_a_server_that_is_killed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "good.gguf", Shape())
    write_card(tmp_path, "good", {"cuda": {**TABLE, "path": str(tmp_path / "good.gguf")}})
    with ServeProgram(tmp_path) as server:
        assert server.complete("good", max_tokens=1).status_code == 200
        runners = server.runners()
        assert len(runners) == 1
        server.process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(runners, timeout=60)
        assert alive == []


def test_a_server_that_is_told_to_stop_ends_its_runners_and_exits_with_0(tmp_path: Path) -> None:
    write_gguf(tmp_path / "good.gguf", Shape())
    write_card(tmp_path, "good", {"cuda": {**TABLE, "path": str(tmp_path / "good.gguf")}})
    with ServeProgram(tmp_path, "--load", "good") as server:
        assert server.complete("good", max_tokens=1).status_code == 200
        children = server.children()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert psutil.wait_procs(children, timeout=60)[1] == []
