"""Ollama's API over a real server: with Ollama's own client, and its faults with plain HTTP."""

import json
import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import ollama
import pytest
from pydantic import JsonValue

from exo import __version__
from exo.api.ollama.models import OLLAMA_VERSION
from exo.cards.card import ModelCard, SamplingDefaults
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, TOOLS_TEMPLATE, serve
from tests.support.fake_model import expected_text
from tests.support.program import DEADLINE_SECONDS

MODEL = "fake/model"
USER_HI = [{"role": "user", "content": "hi"}]
HI = "user: hi\n"
"""What the template makes of it: as many tokens as it has characters."""


def card(name: str, **table: JsonValue) -> ModelCard:
    return fake_card(name, **table).model_copy(update={"sampling_defaults": SamplingDefaults(temperature=0.0)})


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    cards = [
        card(MODEL, chat_template=CHAT_TEMPLATE).model_copy(
            update={"family": "fake", "quantization": "Q4_K_M", "context_length": 512, "capabilities": ("thinking",)}
        ),
        card("fake/tools", chat_template=TOOLS_TEMPLATE),
        card("fake/told", chat_template="{{ raise_exception(messages | tojson) }}"),
        card("fake/eos", chat_template=CHAT_TEMPLATE, eos_after=3),
        card("fake/dies", chat_template=CHAT_TEMPLATE, die_at=3),
        card("fake/unused"),
    ]
    with serve(tmp_path_factory.mktemp("server"), *cards) as url:
        yield url


@contextmanager
def connected(url: str) -> Generator[ollama.Client]:
    client = ollama.Client(host=url)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope="module")
def client(url: str) -> Generator[ollama.Client]:
    with connected(url) as client:
        yield client


def chat(client: ollama.Client, model: str = MODEL, **fields: object) -> ollama.ChatResponse:
    """The client's own method is not wholly typed."""
    request: dict[str, Any] = {"messages": USER_HI, **fields}
    return client.chat(model, stream=False, **request)  # pyright: ignore[reportUnknownMemberType]


def streamed(client: ollama.Client, model: str = MODEL, **fields: object) -> list[ollama.ChatResponse]:
    request: dict[str, Any] = {"messages": USER_HI, **fields}
    return list(client.chat(model, stream=True, **request))  # pyright: ignore[reportUnknownMemberType]


def post(url: str, path: str = "/api/chat", **fields: object) -> httpx.Response:
    usual = {"/api/chat": {"messages": USER_HI, "stream": False}, "/api/generate": {"stream": False}}
    body = {"model": MODEL, **usual.get(path, {}), **fields}
    return httpx.post(f"{url}{path}", json=body, timeout=60)


def error(reply: httpx.Response) -> tuple[int, str]:
    assert set(reply.json()) - {"n_prompt_tokens", "n_ctx"} == {"error"}
    return reply.status_code, reply.json()["error"]


def test_a_chat(client: ollama.Client) -> None:
    reply = chat(client, options={"num_predict": 5})
    assert (reply.message.role, reply.message.content) == ("assistant", expected_text(HI, 5))
    assert reply.message.tool_calls is None
    assert (reply.model, reply.done, reply.done_reason) == (MODEL, True, "length")
    assert (reply.prompt_eval_count, reply.eval_count) == (len(HI), 5)
    durations = (reply.load_duration, reply.prompt_eval_duration, reply.eval_duration)
    assert all(duration is not None and duration >= 0 for duration in durations)
    assert reply.total_duration == sum(duration or 0 for duration in durations)


def test_a_chat_stream(client: ollama.Client) -> None:
    *pieces, last = streamed(client, options={"num_predict": 5})
    assert "".join(piece.message.content or "" for piece in pieces) == expected_text(HI, 5)
    assert {(piece.done, piece.done_reason, piece.eval_count) for piece in pieces} == {(False, None, None)}
    assert (last.done, last.done_reason, last.message.content) == (True, "length", "")
    assert (last.prompt_eval_count, last.eval_count) == (len(HI), 5)


def test_it_streams_unless_told_not_to(url: str) -> None:
    body = {"model": MODEL, "messages": USER_HI, "options": {"num_predict": 2}}
    reply = httpx.post(f"{url}/api/chat", json=body, timeout=60)
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert reply.headers["x-exo-runner"] == "cuda"
    assert len(reply.text.splitlines()) > 1


def test_a_completion_whole_and_streamed(client: ollama.Client) -> None:
    system = "system: Be kind.\n"
    whole = client.generate(MODEL, "hi", system="Be kind.", options={"num_predict": 5})
    assert (whole.response, whole.done_reason) == (expected_text(system + HI, 5), "length")
    *pieces, last = client.generate(MODEL, "hi", system="Be kind.", options={"num_predict": 5}, stream=True)
    assert "".join(piece.response or "" for piece in pieces) == whole.response
    assert (last.done_reason, last.eval_count) == ("length", 5)
    raw = client.generate(MODEL, "hi", raw=True, options={"num_predict": 5})
    assert raw.response == expected_text("hi", 5)


def test_without_a_prompt_a_model_is_loaded(client: ollama.Client) -> None:
    assert "fake/unused" not in [model.model for model in client.ps().models]
    reply = client.generate("fake/unused", keep_alive="5m")
    assert (reply.response, reply.done, reply.done_reason) == ("", True, "load")
    assert "fake/unused" in [model.model for model in client.ps().models]
    assert chat(client, messages=[], keep_alive=-1).done_reason == "load"


def test_a_model_stays_as_long_as_a_request_says_and_is_unloaded_after_one_that_says_0(client: ollama.Client) -> None:
    def expires() -> datetime | None:
        (found,) = [model.expires_at for model in client.ps().models if model.model == "fake/unused"]
        return found

    client.generate("fake/unused", "hi", raw=True, keep_alive="1h30m", options={"num_predict": 1})
    left = expires()
    assert left is not None
    assert timedelta(minutes=89) < left - datetime.now(UTC) <= timedelta(minutes=90)
    client.generate("fake/unused", "hi", raw=True, keep_alive=-1, options={"num_predict": 1})
    assert (left := expires()) is not None
    assert left.year == 9999
    reply = client.generate("fake/unused", keep_alive=0)
    assert (reply.response, reply.done_reason) == ("", "unload")
    assert "fake/unused" not in [model.model for model in client.ps().models]
    client.generate("fake/unused", "hi", raw=True, keep_alive="0s", options={"num_predict": 1})
    deadline = time.monotonic() + DEADLINE_SECONDS
    while "fake/unused" in [model.model for model in client.ps().models]:
        assert time.monotonic() < deadline


def test_values_that_mean_none_or_all_are_accepted(client: ollama.Client) -> None:
    hot = {"num_predict": 5, "temperature": 1.5, "seed": 1}
    everything = chat(client, options={**hot, "top_k": 0}).message.content
    assert chat(client, options={**hot, "top_k": -1, "stop": ""}).message.content == everything
    assert chat(client, options={**hot, "stop": ["", "nowhere to be found"]}).message.content == everything
    whole = expected_text(HI, 40)
    assert chat(client, options={"num_predict": 40, "stop": whole[10:13]}).done_reason == "stop"
    assert chat(client, "fake/eos", options={"num_predict": 0}).done_reason == "stop"


def test_options_are_honoured(client: ollama.Client) -> None:
    whole = expected_text(HI, 40)
    stopped = chat(client, options={"num_predict": 40, "stop": [whole[10:13]]})
    assert (stopped.message.content, stopped.done_reason) == (whole[: whole.index(whole[10:13])], "stop")

    def drawn(seed: int) -> str | None:
        options = {"num_predict": 20, "temperature": 1.5, "seed": seed, "top_k": 50, "min_p": 0.01}
        return chat(client, options=options).message.content

    assert drawn(1) == drawn(1) != drawn(2)
    assert chat(client, "fake/eos", options={"num_predict": -1}).done_reason == "stop"
    full = chat(client, options={"num_predict": -2, "num_ctx": 4096})
    assert full.eval_count == 4096 - len(HI)
    neutral = {
        "mirostat": 0,
        "num_gpu": -1,
        "typical_p": 1.0,
        "num_thread": None,
        "temperature": None,
        "num_predict": 5,
    }
    assert chat(client, options=neutral).message.content == whole[:5]


def test_a_format_is_followed(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert json.loads(chat(client, format="json").message.content or "") == {}
    for text in (
        chat(client, format=schema).message.content,
        client.generate(MODEL, "hi", raw=True, format=schema).response,
    ):
        assert isinstance(json.loads(text or "")["a"], int)


def test_logprobs(client: ollama.Client) -> None:
    reply = chat(client, options={"num_predict": 2}, logprobs=True, top_logprobs=3)
    assert reply.logprobs is not None
    assert [(each.token, each.logprob) for each in reply.logprobs] == [
        (letter, -math.log(2)) for letter in expected_text(HI, 2)
    ]
    assert [len(each.top_logprobs or ()) for each in reply.logprobs] == [3, 3]
    pieces = client.generate(MODEL, "hi", options={"num_predict": 4}, logprobs=True, stream=True)
    assert sum(len(piece.logprobs or ()) for piece in pieces) == 4


def test_reasoning(client: ollama.Client) -> None:
    options = {"num_predict": 20}
    thought = expected_text(f"{HI}<think>", 20).strip()
    reply = chat(client, "fake/tools", think=True, options=options)
    assert (reply.message.thinking, reply.message.content) == (thought, "")
    pieces = list(client.generate("fake/tools", "hi", think="low", options=options, stream=True))
    limited = "".join(piece.thinking or "" for piece in pieces)
    assert limited
    assert thought.startswith(limited)
    quiet = chat(client, "fake/tools", think=False, options=options)
    assert quiet.message.thinking is None
    assert quiet.message.content


def test_what_the_template_is_told(url: str) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": "",
            "thinking": "hm",
            "tool_calls": [
                {"function": {"name": "count", "arguments": {"to": 3}}},
                {"id": "call_B", "function": {"index": 1, "name": "halt", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_name": "halt", "content": "no"},
        {"role": "tool", "content": "1 2 3"},
    ]
    _, told = error(post(url, model="fake/told", messages=messages))
    *_, assistant, first, second = httpx.Response(200, text=told).json()
    assert [call["function"] for call in assistant["tool_calls"]] == [
        {"name": "count", "arguments": {"to": 3}},
        {"name": "halt", "arguments": {}},
    ]
    assert assistant["reasoning_content"] == "hm"
    ids = [call["id"] for call in assistant["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(len(each) == 9 for each in ids)
    assert second == {"role": "tool", "content": "no", "name": "halt", "tool_call_id": ids[1]}
    assert first == {"role": "tool", "content": "1 2 3", "name": "count", "tool_call_id": ids[0]}


def test_tools_are_told_to_the_template(client: ollama.Client) -> None:
    def count(to: int) -> str:
        """Counts.

        Args:
          to: Where to end.
        """
        return str(to)

    without = chat(client, "fake/tools", options={"num_predict": 1})
    reply = chat(client, "fake/tools", tools=[count], options={"num_predict": 1})
    assert (reply.prompt_eval_count or 0) > (without.prompt_eval_count or 0) + len("count to Counts. Where to end.")


def test_a_last_message_of_the_assistant_is_gone_on_with(client: ollama.Client) -> None:
    begun = [*USER_HI, {"role": "assistant", "content": "It is"}]
    reply = chat(client, "fake/tools", messages=begun, options={"num_predict": 5})
    assert reply.message.content == expected_text(f"{HI}assistant: It is", 5)


def test_a_name_may_end_in_latest(client: ollama.Client, url: str) -> None:
    for name in (f"{MODEL}:latest", f"{MODEL}@cuda", f"{MODEL}@cuda:latest"):
        assert chat(client, name, options={"num_predict": 1}).model == MODEL
    assert client.show(f"{MODEL}:latest").details is not None
    assert error(post(url, model=f"{MODEL}:7b"))[0] == 404


def test_embeddings(client: ollama.Client, url: str) -> None:
    reply = client.embed(MODEL, ["one", "two", "one"])
    first, second, third = reply.embeddings
    assert first == third != second
    assert reply.prompt_eval_count == 9
    assert client.embeddings(MODEL, "one").embedding == first
    (short,) = client.embed(MODEL, "one", dimensions=3).embeddings
    assert math.hypot(*short) == pytest.approx(1)
    assert short == pytest.approx([each / math.hypot(*first[:3]) for each in first[:3]])
    assert client.embed(MODEL, []).embeddings == []
    assert error(post(url, "/api/embed", input="x", dimensions=9999))[1].startswith("dimensions: ")
    (cut,) = client.embed(MODEL, "x" * 5000).embeddings
    (whole,) = client.embed(MODEL, "x" * 4096).embeddings
    assert cut == whole
    assert client.embeddings(MODEL, "x" * 5000).embedding == whole
    for path, field in (("/api/embed", "input"), ("/api/embeddings", "prompt")):
        status, message = error(post(url, path, **{field: "x" * 5000}, truncate=False))
        assert (status, message) == (400, "prompt too long; exceeded max context length by 904 tokens")
    assert post(url, "/api/embed", input="x", options={"temperature": 1}).status_code == 200
    assert error(post(url, "/api/embeddings", prompt=""))[1].startswith("prompt: ")


def test_what_there_is(client: ollama.Client) -> None:
    client.generate(MODEL)
    models = {model.model: model for model in client.list().models}
    assert set(models) == {MODEL, "fake/tools", "fake/told", "fake/eos", "fake/dies", "fake/unused"}
    details = models[MODEL].details
    assert details is not None
    assert (details.family, details.format, details.quantization_level) == ("fake", "gguf", "Q4_K_M")
    shown = client.show(MODEL)
    assert shown.template == CHAT_TEMPLATE
    assert shown.capabilities == ["completion", "thinking"]
    assert shown.modelinfo == {
        "general.architecture": "fake",
        "fake.block_count": 1,
        "fake.embedding_length": 1,
        "fake.context_length": 4096,
    }
    (loaded,) = [model for model in client.ps().models if model.model == MODEL]
    assert (loaded.context_length, loaded.size_vram, loaded.digest) == (4096, 0, models[MODEL].digest)
    client.generate("fake/tools")
    assert "tools" in (client.show("fake/tools").capabilities or ())


def test_a_server_is_there(url: str) -> None:
    assert httpx.get(f"{url}/api/version", timeout=60).json() == {"version": OLLAMA_VERSION, "exo": __version__}
    assert (httpx.head(url, timeout=60).status_code, httpx.get(url, timeout=60).status_code) == (200, 200)


def test_what_is_not_there_says_so(client: ollama.Client, url: str) -> None:
    for ask in (lambda: client.push("x"), lambda: client.delete("x"), lambda: client.copy("x", "y")):
        with pytest.raises(ollama.ResponseError) as missing:
            ask()
        assert missing.value.status_code == 501
        assert missing.value.error.startswith("/api/")
    assert error(httpx.get(f"{url}/api/nothing", timeout=60))[0] == 404


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"options": {"temperature": "1"}}, "options.temperature: "),
    ({"options": {"num_predict": False}}, "options.num_predict: "),
    ({"options": {"num_predict": -3}}, "options.num_predict: "),
    ({"options": {"top_p": -0.1}}, "options.top_p: "),
    ({"options": {"top_k": -2}}, "options.top_k: "),
    ({"options": {"stop": 5}}, "options.stop: "),
    ({"options": 5}, "options: "),
    ({"keep_alive": "soon"}, "keep_alive: must be"),
    ({"format": "xml"}, "format: must be 'json' or a JSON Schema"),
    ({"format": {"type": "no"}}, "format.type: 'no' is not a type"),
    ({"think": "much"}, "think: must be"),
    ({"top_logprobs": 1}, "top_logprobs: only allowed where logprobs is true"),
    (
        {"messages": [{"role": "user", "content": "x", "images": [5]}]},
        "messages.0.images.0: must be a picture in base64",
    ),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content: "),
    ({"messages": [{"role": "me", "content": "x"}]}, "messages.0.role: "),
    (
        {"messages": [{"role": "user", "content": "x" * 5000}]},
        "prompt too long; exceeded max context length by 911 tokens",
    ),
    (
        {"messages": [{"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
        "messages.0.tool_",
    ),
    ({"tools": [{"type": "function"}]}, "tools.0.function: this field is required"),
]


@pytest.mark.parametrize(("fields", "message"), FAULTS)
def test_faults_are_named_in_ollamas_envelope(url: str, fields: dict[str, Any], message: str) -> None:
    status, told = error(post(url, **fields))
    assert (status, told[: len(message)]) == (400, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "x", "suffix": "y"}, "suffix: fake/model cannot fill in"),
        ({"prompt": "x", "template": "y"}, "template: not supported"),
        ({"prompt": "x", "context": [1]}, "context: not supported"),
        ({"prompt": "x", "images": [5]}, "images.0: must be a picture in base64"),
        ({"prompt": "x", "raw": True, "images": ["eA=="]}, "images: not accepted where raw is true"),
        ({"prompt": "x", "suffix": "y", "images": ["eA=="]}, "images: not accepted where there is a suffix"),
        ({"prompt": "x", "raw": True, "system": "y"}, "system: not accepted where raw is true"),
        ({"prompt": "x", "raw": True, "think": True}, "think: not accepted where raw is true"),
    ],
)
def test_faults_of_a_completion(url: str, fields: dict[str, Any], message: str) -> None:
    status, told = error(post(url, "/api/generate", **fields))
    assert (status, told[: len(message)]) == (400, message)


def test_faults_with_ollamas_client(client: ollama.Client, url: str) -> None:
    with pytest.raises(ollama.ResponseError) as missing:
        chat(client, "fake/mode")
    assert missing.value.status_code == 404
    assert "did you mean fake/model" in missing.value.error
    assert error(httpx.post(f"{url}/api/show", json={}, timeout=60)) == (400, "model: this field is required")


def test_a_stream_that_fails_says_so_in_the_stream(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError) as failed:
        streamed(client, "fake/dies", options={"num_predict": 50})
    assert failed.value.status_code == -1  # there was a 200, and then the error among the lines
