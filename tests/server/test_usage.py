"""What meters read of a reply: details of the usage, llama-server's timings, and the fingerprint."""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import write_scripted

MODEL = "fake/model"
REPLY = ("one ", "two ", "three ", "four ", "five ", "six ", "seven ", "eight ", "nine ", "ten")
TOKENS = range(256, 256 + len(REPLY))
"""The tokens of a scripted model's reply, which follows a line feed."""
BODIES: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "user: hi\n"},
}
N_PROMPT = len("user: hi\n")
TIMINGS = {
    "cache_n",
    *(f"{part}_{name}" for part in ("prompt", "predicted") for name in ("n", "ms", "per_token_ms", "per_second")),
}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    card = fake_card(MODEL, chat_template=CHAT_TEMPLATE).model_copy(update={"quantization": "Q4_K_M"})
    thinks = fake_card("fake/thinks", chat_template=CHAT_TEMPLATE + "<think>{# </think> #}")
    with (
        serve(tmp_path_factory.mktemp("server"), card, thinks) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def chunks(http: httpx.Client, path: str, **body: object) -> list[dict[str, Any]]:
    reply = http.post(path, json={"model": MODEL, "max_tokens": 5, "stream": True, **BODIES[path], **body})
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("path", BODIES)
def test_timings_come_when_they_are_asked_for(http: httpx.Client, path: str) -> None:
    body = {"model": MODEL, "max_tokens": 5, **BODIES[path]}
    whole = http.post(path, json={**body, "timings_per_token": True})
    assert "x-exo-warning" not in whole.headers
    timings = whole.json()["timings"]
    assert set(timings) == TIMINGS
    assert (timings["cache_n"] + timings["prompt_n"], timings["predicted_n"]) == (N_PROMPT, 5)
    assert min(timings["prompt_ms"], timings["predicted_ms"], timings["predicted_per_second"]) >= 0
    assert "timings" not in http.post(path, json=body).json()


@pytest.mark.parametrize("path", BODIES)
def test_each_chunk_of_a_stream_has_timings_up_to_there(http: httpx.Client, path: str) -> None:
    told: list[dict[str, Any]] = [chunk["timings"] for chunk in chunks(http, path, timings_per_token=True)]
    assert all(set(timings) == TIMINGS for timings in told)
    counts: list[int] = [timings["predicted_n"] for timings in told]
    assert counts == sorted(counts)
    assert counts[-1] == 5
    *_, last = chunks(http, path, timings_per_token=True, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["timings"]["predicted_n"] == 5
    assert not any("timings" in chunk for chunk in chunks(http, path))


def test_usage_counts_reasoning_in_both_forms(http: httpx.Client) -> None:
    path = "/v1/chat/completions"
    body = {"model": "fake/thinks", "max_tokens": 6, **BODIES[path]}
    details = http.post(path, json=body).json()["usage"]["completion_tokens_details"]
    assert details == {"reasoning_tokens": 6, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    *_, last = chunks(http, path, **{**body, "stream_options": {"include_usage": True}})
    assert last["usage"]["completion_tokens_details"] == details


def test_the_fingerprint_names_the_quantisation(http: httpx.Client) -> None:
    body = {"model": MODEL, "max_tokens": 1, **BODIES["/v1/completions"]}
    assert http.post("/v1/completions", json=body).json()["system_fingerprint"] == "fake-1-Q4_K_M"


def test_llama_cpp_counts_its_guesses_and_tells_the_type_of_its_kv_cache(tmp_path: Path) -> None:
    write_scripted(tmp_path / "tiny.gguf", REPLY)
    table = {"path": str(tmp_path / "tiny.gguf"), "n_ctx": 1024, "threads": 1, "speculate": 4}
    write_card(tmp_path, "tiny", {"cuda": {**table, "cache_type_k": "f32", "cache_type_v": "f16"}}, quantization="F32")
    with ServeProgram(tmp_path) as server:
        reply = server.complete("tiny", prompt=[*TOKENS, ord("\n")], temperature=0, timings_per_token=True).json()
    assert reply["choices"][0]["text"] == "".join(REPLY)
    assert reply["system_fingerprint"].endswith("-F32-kv-f32/f16")
    details, timings = reply["usage"]["completion_tokens_details"], reply["timings"]
    right, wrong = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
    assert right > 0  # the reply is in the prompt
    assert (timings["draft_n"], timings["draft_n_accepted"]) == (right + wrong, right)


def test_the_chosen_token_is_among_the_top_ones(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 20, "logprobs": 1, "seed": 3}
    found = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == logprob
    assert {len(top) for top in found["top_logprobs"]} == {1, 2}


@pytest.mark.parametrize("form", [{"101": 100}, [[101, 100]], [[101, 100], [102, False]]])
def test_a_bias_is_a_table_or_llama_servers_pairs(http: httpx.Client, form: object) -> None:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 3}
    reply = http.post("/v1/completions", json={**body, "logit_bias": form})
    assert reply.status_code == 200, reply.text
    wrong = http.post("/v1/completions", json={**body, "logit_bias": [["word", 1]]})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_value")
