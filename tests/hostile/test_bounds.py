"""Requests and answers whose size somebody else decides: what is too large is refused, and harms nobody else."""

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from exo.api.llama_server import MAX_TEXT
from exo.worker.protocol.messages import MAX_PROMPT_LOGPROBS, MAX_TOKENIZED, PART_TOKENS
from tests.conftest import fake_card
from tests.support.api_server import serve
from tests.support.fake_model import expected_text

POISON = "poison"


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    cards = fake_card("fake/model", n_ctx=1 << 16, chunk=1 << 16, slots=4), fake_card("fake/small", n_ctx=16)
    with serve(tmp_path_factory.mktemp("server"), *cards) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield client


def complete(http: httpx.Client, **fields: object) -> httpx.Response:
    return http.post("/v1/completions", json={"model": "fake/model", "temperature": 0, **fields})


def error(reply: httpx.Response) -> tuple[int, str | None, str]:
    body = reply.json()["error"]
    return reply.status_code, body["param"], body["message"]


# --- tokens ---


def test_a_long_text_is_tokenized_and_made_text_again(http: httpx.Client) -> None:
    text = "naïve café €😀 " * PART_TOKENS
    tokens = http.post("/tokenize", json={"model": "fake/model", "content": text}).json()["tokens"]
    assert tokens == list(text.encode())
    pieces = http.post("/tokenize", json={"model": "fake/model", "content": text, "with_pieces": True}).json()["tokens"]
    assert [each["id"] for each in pieces] == tokens
    assert pieces[0] == {"id": 110, "piece": "n"}
    assert pieces[2]["piece"] == [0xC3]
    back = http.post("/detokenize", json={"model": "fake/model", "tokens": tokens}).json()["content"]
    assert back == text


def test_a_text_that_is_too_long_to_be_tokenized_is_refused_by_name(http: httpx.Client) -> None:
    for length, most in ((15 << 20, MAX_TEXT), (MAX_TOKENIZED + 1, MAX_TOKENIZED)):
        status, param, message = error(http.post("/tokenize", json={"model": "fake/model", "content": "1" * length}))
        assert (status, param) == (400, "content")
        assert str(most) in message
    assert len(complete(http, prompt="hi", max_tokens=3).json()["choices"][0]["text"]) == 3


def test_streams_go_on_while_a_million_tokens_are_told(http: httpx.Client) -> None:
    with (
        ThreadPoolExecutor() as pool,
        http.stream(
            "POST",
            "/v1/completions",
            json={"model": "fake/model", "prompt": "hi", "max_tokens": 60_000, "stream": True},
        ) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        body = {"model": "fake/model", "content": "a" * (MAX_TOKENIZED - 1)}
        told = pool.submit(http.post, "/tokenize", json=body)
        before = 0
        while not told.done():
            next(lines)
            before += 1
        assert len(told.result().json()["tokens"]) == MAX_TOKENIZED - 1
        assert before > 100


# --- log-probabilities ---


@pytest.mark.parametrize("stream", [False, True])
def test_the_logprobs_of_a_long_prompt_are_all_there(http: httpx.Client, stream: bool) -> None:
    prompt = "the quick brown fox " * 200
    fields = {"prompt": prompt, "echo": True, "logprobs": 20, "max_tokens": 2}
    if stream:
        lines = complete(http, stream=True, **fields).text.split("\n\n")
        chunks = [httpx.Response(200, text=line[6:]).json() for line in lines if line[6:7] == "{"]
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    else:
        choices = complete(http, **fields).json()["choices"]
    assert "".join(choice["text"] for choice in choices) == prompt + expected_text(prompt, 2)
    told = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
    assert [token for part in told for token in part["tokens"]] == list(prompt + expected_text(prompt, 2))
    assert [at for part in told for at in part["text_offset"]] == list(range(len(prompt) + 2))
    tops = [top for part in told for top in part["top_logprobs"]]
    assert tops[0] is None
    assert all(tops[1:])


def test_more_logprobs_than_can_be_told_are_refused_by_name(http: httpx.Client) -> None:
    status, param, message = error(complete(http, prompt="a" * 44_000, echo=True, logprobs=20, max_tokens=0))
    assert (status, param) == (400, "logprobs")
    assert str(MAX_PROMPT_LOGPROBS // 21) in message
    third = "a" * (MAX_PROMPT_LOGPROBS // 42 + 9)  # the fake runner knows 13 alternatives
    status, param, message = error(complete(http, prompt=third, n=3, echo=True, logprobs=20, max_tokens=0))
    assert (status, param) == (400, "logprobs")
    assert str(MAX_PROMPT_LOGPROBS) in message


def test_echoes_of_token_ids_do_not_disturb_one_another(http: httpx.Client) -> None:
    def echo(token: int) -> httpx.Response:
        return complete(http, prompt=[token] * 9000, echo=True, max_tokens=1)

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(echo, range(97, 105)))
    for at, reply in enumerate(replies):
        assert reply.json()["choices"][0]["text"].startswith(chr(97 + at) * 9000)


# --- prompts ---


def test_a_prompt_that_can_be_in_no_context_is_refused_before_it_is_tokenized(http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json={"model": "fake/small", "prompt": "a" * (16 * 1024 + 1)})
    status, param, message = error(reply)
    assert (status, param, reply.json()["error"]["code"]) == (400, "prompt", "context_length_exceeded")
    assert "16 tokens" in message


def test_choices_of_a_long_prompt_are_what_each_would_be_alone(http: httpx.Client) -> None:
    prompt = "the quick brown fox " * 2000
    choices = complete(http, prompt=prompt, n=16, max_tokens=3).json()["choices"]
    assert [choice["text"] for choice in choices] == [expected_text(prompt, 3)] * 16
    fields = {"prompt": prompt, "max_tokens": 12, "temperature": 1.0}
    drawn = [choice["text"] for choice in complete(http, n=3, seed=7, **fields).json()["choices"]]
    assert drawn == [complete(http, seed=seed, **fields).json()["choices"][0]["text"] for seed in (7, 8, 9)]


# --- a runner that breaks the protocol ---


def test_a_request_that_breaks_the_protocol_is_not_tried_again_and_the_others_are(tmp_path: Path) -> None:
    card = fake_card("fake/model", overlong_for=POISON, log_commands=True, step_seconds=0.002)
    with serve(tmp_path, card) as url, httpx.Client(base_url=url, timeout=60) as http:
        begun = threading.Event()

        def follow() -> str:
            text = ""
            body = {"model": "fake/model", "prompt": "hi", "temperature": 0, "max_tokens": 300, "stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
                for line in stream.iter_lines():
                    begun.set()
                    if line.startswith("data: {"):
                        text += httpx.Response(200, text=line[6:]).json()["choices"][0]["text"]
            return text

        with ThreadPoolExecutor() as pool:
            streamed = pool.submit(follow)
            begun.wait()
            reply = http.post("/tokenize", json={"model": "fake/model", "content": POISON})
            assert reply.status_code >= 500
            assert "wrote a line of more than" in reply.json()["error"]["message"]
            assert streamed.result() == expected_text("hi", 300)
        log = "".join(path.read_text() for path in tmp_path.glob("*.log"))
        assert log.count("tokenize tok-") == 1
