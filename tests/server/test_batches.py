"""Requests with several texts, and endpoints that generate nothing, on models of every task."""

import math
from collections.abc import Generator

import httpx
import pytest

from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve

LONG = "x" * 5000
"""More tokens than the fake runner's context holds."""
TASKS = {"writes": "TextGeneration", "embeds": "TextEmbedding", "ranks": "TextRanking"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    cards = [
        fake_card(name, chat_template=CHAT_TEMPLATE).model_copy(update={"tasks": (task,)})
        for name, task in TASKS.items()
    ]
    with serve(tmp_path_factory.mktemp("server"), *cards) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("model", TASKS)
@pytest.mark.parametrize(
    ("path", "body", "reply"),
    [
        ("/tokenize", {"content": "hi"}, {"tokens": [104, 105]}),
        ("/tokenize", {"content": ""}, {"tokens": []}),
        ("/detokenize", {"tokens": [104, 105]}, {"content": "hi"}),
        ("/apply-template", {"messages": [{"role": "user", "content": "hi"}]}, {"prompt": "user: hi\n"}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}, {"input_tokens": 9}),
    ],
)
def test_tokens_are_told_whatever_the_model_is_for(
    client: httpx.Client, model: str, path: str, body: dict[str, object], reply: dict[str, object]
) -> None:
    answer = client.post(path, json={"model": model, **body})
    assert (answer.status_code, answer.json()) == (200, reply), answer.text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"model": "embeds", "input": ["a", "b", LONG]}, "input.2"),
        ("/v1/embeddings", {"model": "embeds", "input": ["a", "", "b"]}, "input.1"),
        ("/v1/embeddings", {"model": "embeds", "input": [[1], [1, 10**6]]}, "input.1"),
        ("/v1/embeddings", {"model": "embeds", "input": ["a", 3]}, "input.1"),
        ("/v1/embeddings", {"model": "embeds", "input": LONG}, "input"),
        ("/embedding", {"model": "embeds", "content": ["a", LONG]}, "content.1"),
        ("/api/embed", {"model": "embeds", "input": ["a", LONG], "truncate": False}, "in Ollama's words"),
        ("/v1/rerank", {"model": "ranks", "query": "q", "documents": ["a", LONG, "b"]}, "documents.1"),
        ("/v1/rerank", {"model": "ranks", "query": "q", "documents": ["a", ""]}, "documents.1"),
        ("/v1/completions", {"model": "writes", "prompt": ["a", LONG], "n": 2}, "prompt.1"),
        ("/v1/completions", {"model": "writes", "prompt": [[1], [1] * 5000]}, "prompt.1"),
        ("/v1/completions", {"model": "writes", "prompt": [[1], [1, 10**6]], "n": 3}, "prompt.1"),
        ("/v1/completions", {"model": "writes", "prompt": ["a", "b"], "logit_bias": {"1000000": 1}}, "logit_bias"),
        ("/v1/completions", {"model": "writes", "prompt": LONG}, "prompt"),
    ],
)
def test_an_error_names_the_member_of_a_batch(
    client: httpx.Client, path: str, body: dict[str, object], param: str
) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    if not isinstance(error, str):
        assert error["param"] == param
    if "." in param and f"your {param} resulted in" not in message:
        assert message.startswith(f"{param}: ")
        assert not message.removeprefix(f"{param}: ").startswith(param.split(".")[0] + ":")


def test_llama_servers_names_of_ranking_and_embeddings(client: httpx.Client) -> None:
    body = {"model": "ranks", "query": "q", "documents": ["a", "b"], "top_n": 1}
    paths = ("/v1/rerank", "/rerank", "/reranking", "/v1/reranking")
    first, *others = (client.post(path, json=body).json() for path in paths)
    assert len(first["results"]) == 1
    assert others == [first] * 3
    texts = [f"text {number}" for number in range(40)]  # encoded in pieces
    known = client.post("/v1/embeddings", json={"model": "embeds", "input": texts}).json()["data"]
    expected = [{"index": each["index"], "embedding": [each["embedding"]]} for each in known]
    for path, field in (("/embedding", "content"), ("/embedding", "input")):
        assert client.post(path, json={"model": "embeds", field: texts}).json() == expected
    one = client.post("/embedding", json={"model": "embeds", "content": texts[0]}).json()
    assert one == expected[:1]
    for wrong in ({}, {"content": "a", "input": "a"}, {"content": "a", "embd_normalize": -1}):
        assert client.post("/embedding", json={"model": "embeds", **wrong}).status_code == 400


def test_the_models_own_size_is_accepted_for_dimensions(client: httpx.Client) -> None:
    def vector(**fields: int) -> list[float]:
        reply = client.post("/v1/embeddings", json={"model": "embeds", "input": "hi", **fields})
        return reply.json()["data"][0]["embedding"]

    whole = vector()
    assert vector(dimensions=len(whole)) == pytest.approx(whole)
    assert math.hypot(*whole) == pytest.approx(1)


def test_pairs_of_texts_are_scored_as_vllm_does(client: httpx.Client) -> None:
    def scores(**body: object) -> list[float]:
        reply = client.post("/v1/score", json=body)
        assert reply.status_code == 200, reply.text
        return [each["score"] for each in reply.json()["data"]]

    ranked = client.post("/v1/rerank", json={"model": "ranks", "query": "q", "documents": ["a", "bb"]}).json()
    raw = [each["relevance_score"] for each in sorted(ranked["results"], key=lambda each: each["index"])]
    pair = {"model": "ranks", "text_1": "q", "text_2": ["a", "bb"]}
    assert scores(**pair, use_activation=False) == pytest.approx(raw)
    assert scores(**pair) == pytest.approx([1 / (1 + math.exp(-each)) for each in raw])
    assert scores(model="ranks", queries=["q", "q"], documents=["a", "bb"], use_activation=False) == pytest.approx(raw)
    one, other = (
        each["embedding"]
        for each in client.post("/v1/embeddings", json={"model": "embeds", "input": ["a", "bb"]}).json()["data"]
    )
    cosine = sum(left * right for left, right in zip(one, other, strict=True))
    assert scores(model="embeds", text_1="a", text_2=["a", "bb"]) == pytest.approx([1, cosine])
    for wrong in (
        {"text_1": "a"},
        {"text_2": "a"},
        {"text_1": ["a", "b"], "text_2": ["a"]},
        {"text_1": "", "text_2": "a"},
    ):
        assert client.post("/v1/score", json={"model": "embeds", **wrong}).status_code == 400, wrong
    long = client.post("/v1/score", json={"model": "ranks", "text_1": "a", "text_2": ["b", LONG]})
    assert (long.status_code, long.json()["error"]["param"]) == (400, "text_2.1")


def test_what_llama_server_does_to_slots_and_adapters_is_named_where_it_is_missing(client: httpx.Client) -> None:
    assert client.get("/lora-adapters", params={"model": "embeds"}).json() == []
    for path, word in (("/slots/0?action=save", "prefix_disk_bytes"), ("/lora-adapters", "lora")):
        refused = client.post(path, json={"filename": "a.bin"})
        assert refused.status_code == 501
        assert word in refused.json()["error"]["message"]
