"""A prompt that is longer than the context: each API's error in the words by which agents recognise it."""

import re
import threading
from collections.abc import Generator
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve

MODEL = "fake/short"
CONTEXT = 64
LONG = "x" * 90
MESSAGES = [{"role": "user", "content": LONG}]
N_PROMPT = len(f"user: {LONG}\n")
BODIES: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": f"user: {LONG}\n"},
    "/v1/responses": {"input": LONG},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": LONG},
}
OPENAI_PHRASES = (
    r"maximum context length is (\d+) tokens",
    r"This model's maximum context length is \d+ tokens\. However, ",
    r"resulted in (\d+) tokens",
    r"(?i)reduce the length of the (messages|prompt|input)",
    r"(?i)\b(maximum context|context length|context window)\b",
)
"""As OpenAI and vLLM write it, and as OpenRouter's, Groq's and LiteLLM's clients and Cline look for it."""


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    card = fake_card(MODEL, chat_template=CHAT_TEMPLATE, n_ctx=CONTEXT)
    with serve(tmp_path_factory.mktemp("server"), card) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_openais_paths_say_it_in_openais_words(http: httpx.Client, path: str, stream: bool) -> None:
    reply = http.post(path, json={"model": MODEL, "stream": stream, **BODIES[path]})
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["code"]) == (
        400,
        "invalid_request_error",
        "context_length_exceeded",
    )
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (N_PROMPT, CONTEXT)
    for phrase in OPENAI_PHRASES:
        assert re.search(phrase, error["message"]), (phrase, error["message"])
    assert re.findall(r"\d+", error["message"]) == [str(CONTEXT), str(N_PROMPT)]


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_path_says_it_in_anthropics_words(http: httpx.Client, stream: bool) -> None:
    reply = http.post("/v1/messages", json={"model": MODEL, "stream": stream, **BODIES["/v1/messages"]})
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["message"] == f"prompt is too long: {N_PROMPT} tokens > {CONTEXT - 1} maximum"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (N_PROMPT, CONTEXT)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_ollamas_paths_say_it_in_ollamas_words(http: httpx.Client, path: str, stream: bool) -> None:
    reply = http.post(path, json={"model": MODEL, "stream": stream, **BODIES[path]})
    excess = N_PROMPT - CONTEXT
    assert reply.status_code == 400
    assert reply.json() == {
        "error": f"prompt too long; exceeded max context length by {excess} tokens",
        "n_prompt_tokens": N_PROMPT,
        "n_ctx": CONTEXT,
    }


def test_the_longest_prompt_is_accepted_and_one_token_more_is_not(http: httpx.Client) -> None:
    def reply(length: int) -> httpx.Response:
        return http.post("/v1/completions", json={"model": MODEL, "prompt": [97] * length, "max_tokens": 1})

    assert reply(CONTEXT - 1).status_code == 200
    error = reply(CONTEXT).json()["error"]
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (CONTEXT, CONTEXT)


def test_a_text_to_embed_that_is_too_long(http: httpx.Client) -> None:
    card_limit = http.post("/v1/embeddings", json={"model": MODEL, "input": ["short", LONG]})
    error = card_limit.json()["error"]
    assert (card_limit.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input.1")
    assert error["n_prompt_tokens"] == len(LONG)
    assert "maximum context length" in error["message"]
    assert "output" not in error["message"]


def test_a_prompt_too_large_to_tokenize_has_an_estimate(http: httpx.Client) -> None:
    error = http.post("/v1/completions", json={"model": MODEL, "prompt": "word " * 20_000}).json()["error"]
    assert (error["code"], error["n_prompt_tokens"], error["n_ctx"]) == ("context_length_exceeded", 25_000, CONTEXT)


def test_official_clients_raise_their_own_exceptions(http: httpx.Client) -> None:
    base = str(http.base_url).rstrip("/")
    with openai.OpenAI(base_url=f"{base}/v1", api_key="unused") as client:
        with pytest.raises(openai.BadRequestError) as found:
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": LONG}], stream=True)
        assert found.value.code == "context_length_exceeded"
    with (
        anthropic.Anthropic(base_url=base, api_key="unused") as other,
        pytest.raises(anthropic.BadRequestError, match=rf"prompt is too long: {N_PROMPT} tokens > \d+ maximum"),
    ):
        other.messages.create(model=MODEL, max_tokens=4, messages=[{"role": "user", "content": LONG}])


@pytest.mark.parametrize("path", BODIES)
def test_a_long_stream_is_refused_before_a_200_although_its_model_is_still_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, gate: Path
) -> None:
    monkeypatch.setattr("exo.api.http.response.GRACE_SECONDS", 0)
    monkeypatch.setattr("exo.api.http.response.SHORT_REQUEST", 80)
    card = fake_card(MODEL, chat_template=CHAT_TEMPLATE, n_ctx=CONTEXT, load_gate=str(gate))
    with serve(tmp_path, card) as url, httpx.Client(base_url=url, timeout=60) as http:
        opening = threading.Timer(0.3, lambda: gate.open("wb").close())
        opening.start()
        reply = http.post(path, json={"model": MODEL, "stream": True, **BODIES[path]})
        opening.join()
        assert reply.status_code == 400
        assert (reply.json() if path.startswith("/api/") else reply.json()["error"])["n_ctx"] == CONTEXT
