"""Runners die under requests, by real signals, and no client loses or sees twice a single token."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import JsonValue

from tests.support.server import ServeProgram, long_story, write_card
from tests.support.twins import BACKENDS, write_twins

TOKENS = 600
BODY = long_story(TOKENS)


@pytest.fixture(scope="module", params=["cuda", "mlx"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    """A model that only one engine may serve, in float32."""
    home = tmp_path_factory.mktemp("home")
    write_card(home, "tiny", write_twins(home), backends=BACKENDS, runner=request.param)
    with ServeProgram(home) as program:
        yield program


def send_signal(server: ServeProgram, number: signal.Signals) -> None:
    (runner,) = server.runners()
    os.kill(runner.pid, number)


def instance(server: ServeProgram, model: str) -> dict[str, Any]:
    (found,) = [each for each in server.client.get("/v1/instances").json()["data"] if each["model"] == model]
    return found


def chunks_of(reply: httpx.Response, at: int, disturb: Callable[[], None]) -> list[dict[str, JsonValue]]:
    """The chunks of a stream, which is disturbed when so many have come; it must end with [DONE]."""
    chunks: list[dict[str, JsonValue]] = []
    data = [""]
    for line in reply.iter_lines():
        if not line.startswith("data: "):
            continue
        data.append(line[6:])
        if data[-1] != "[DONE]":
            chunks.append(json.loads(data[-1]))
        if len(chunks) == at and data[-1] != "[DONE]":
            disturb()
    assert data[-1] == "[DONE]", data[-1]
    return chunks


def texts_of(chunks: list[dict[str, JsonValue]], n: int = 1) -> list[str]:
    texts = [""] * n
    for chunk in chunks:
        for choice in json.loads(json.dumps(chunk["choices"])):
            texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return texts


def whole(server: ServeProgram, **body: object) -> list[str]:
    reply = server.complete("tiny", **{**BODY, **body})
    assert reply.status_code == 200, reply.text
    return [choice["text"] for choice in reply.json()["choices"]]


def streamed(
    server: ServeProgram, path: str, body: dict[str, object], at: int, disturb: Callable[[], None]
) -> list[dict[str, JsonValue]]:
    request = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}, **body}
    with server.client.stream("POST", path, json=request) as reply:
        assert reply.status_code == 200
        return chunks_of(reply, at, disturb)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stream_goes_on_where_its_runner_died(server: ServeProgram, number: signal.Signals) -> None:
    undisturbed = whole(server)
    before = server.runners()
    chunks = streamed(server, "/v1/completions", BODY, 1, lambda: send_signal(server, number))
    assert server.runners() != before
    assert texts_of(chunks) == undisturbed
    usage = chunks[-1]["usage"]
    assert isinstance(usage, dict)
    assert usage["completion_tokens"] == TOKENS
    assert usage["total_tokens"] == TOKENS + int(str(usage["prompt_tokens"]))


def test_several_choices_of_several_streams_go_on(server: ServeProgram) -> None:
    """Eight sequences on four slots: some have died in the middle, some before their first token."""
    undisturbed = whole(server, n=4)

    def stream(number: int) -> list[str]:
        def kill() -> None:
            if number == 0:
                send_signal(server, signal.SIGKILL)

        return texts_of(streamed(server, "/v1/completions", {**BODY, "n": 4}, 60, kill), 4)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(stream, range(2))) == [undisturbed, undisturbed]


def test_penalties_and_stop_strings_hold_across_a_death(server: ServeProgram) -> None:
    penalties = {"frequency_penalty": 0.3, "presence_penalty": 0.2}
    text = whole(server, **penalties)[0]
    stop = [text[400:404], text[-2:] + "never"]
    undisturbed = whole(server, **penalties, stop=stop)
    chunks = streamed(
        server, "/v1/completions", {**BODY, **penalties, "stop": stop}, 20, lambda: send_signal(server, signal.SIGKILL)
    )
    assert texts_of(chunks) == undisturbed


def test_a_chat_goes_on_through_three_deaths(server: ServeProgram) -> None:
    body: dict[str, object] = {**BODY, "messages": [{"role": "user", "content": "hello"}]}
    del body["prompt"]
    undisturbed = texts_of(streamed(server, "/v1/chat/completions", body, 0, lambda: None))
    for at in (2, 30, 200):
        chunks = streamed(server, "/v1/chat/completions", body, at, lambda: send_signal(server, signal.SIGKILL))
        assert texts_of(chunks) == undisturbed


def test_a_reply_in_one_piece_survives_a_death(server: ServeProgram) -> None:
    """The runner dies under both requests; the stream's only tells when the other has begun."""
    undisturbed = whole(server)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(whole, server)
        body = {**BODY, "seed": 6}
        chunks = streamed(server, "/v1/completions", body, 20, lambda: send_signal(server, signal.SIGKILL))
        assert reply.result() == undisturbed
    assert texts_of(chunks) == whole(server, seed=6)


def test_streams_of_a_pool_go_on_when_their_runner_dies_while_one_of_them_is_parked(tmp_path: Path) -> None:
    """Two choices need more cells than there are, so that one waits in RAM until the other has ended."""
    cells, length = 2048, 1400
    table = write_twins(tmp_path, n_ctx=cells)["cuda"]
    for kv in ("split", "pool"):
        write_card(tmp_path, kv, {"cuda": {**table, "kv": kv}}, backends=["LlamaCppCpu"])
    body = {**BODY, "max_tokens": length, "n": 2, "return_token_ids": True}
    texts, counts, killed = ["", ""], [0, 0], False
    with ServeProgram(tmp_path) as server:
        undisturbed = [each["text"] for each in server.complete("split", **body).json()["choices"]]
        request = {"model": "pool", "stream": True, **body}
        with server.client.stream("POST", "/v1/completions", json=request) as reply:
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["text"]
                    counts[choice["index"]] += len(choice.get("token_ids") or ())
                if not killed and sum(counts) > cells and max(counts) < length:
                    os.kill(instance(server, "test/pool")["pid"], signal.SIGKILL)
                    killed = True
        deaths = instance(server, "test/pool")["deaths"]
    assert (killed, deaths) == (True, 1)
    assert (texts, counts) == (undisturbed, [length, length])
