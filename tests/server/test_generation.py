"""Chat completions and completions over a real server, with plain HTTP and with OpenAI's own client."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

from exo.cards.card import ModelCard, SamplingDefaults
from exo.chat.template.render_main import LIMITS
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve
from tests.support.fake_model import expected_text

MODEL = "fake/model"
USER_HI = [{"role": "user", "content": "hi"}]
HI = "user: hi\n"
"""What the template makes of it: as many tokens as it has characters."""


def greedy_card() -> ModelCard:
    return fake_card("fake/greedy").model_copy(update={"sampling_defaults": SamplingDefaults(temperature=0.0)})


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    cards = [
        fake_card(MODEL, chat_template=CHAT_TEMPLATE),
        fake_card("fake/short", n_ctx=16, chat_template=CHAT_TEMPLATE),
        fake_card("fake/eos", eos_after=3),
        fake_card("fake/literal", chat_template="{{ messages[0].content }}"),
        fake_card("fake/special", chat_template="{{ eos_token }}"),
        greedy_card(),
    ]
    with serve(tmp_path_factory.mktemp("server"), *cards) as url:
        yield url


@pytest.fixture(scope="module")
def http(url: str) -> Generator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> Generator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


def chat(http: httpx.Client, **fields: object) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": MODEL, "messages": USER_HI, "max_tokens": 8, **fields})


def complete(http: httpx.Client, **fields: object) -> httpx.Response:
    return http.post("/v1/completions", json={"model": MODEL, "prompt": "hi", "max_tokens": 8, **fields})


def texts(reply: httpx.Response) -> list[str]:
    assert reply.status_code == 200, reply.text
    return [choice["text"] for choice in reply.json()["choices"]]


def error(reply: httpx.Response) -> tuple[int, str, str | None]:
    body = reply.json()["error"]
    assert set(body) - {"n_prompt_tokens", "n_ctx"} == {"message", "type", "param", "code"}
    assert body["message"]
    return reply.status_code, body["code"], body["param"]


def test_a_chat_with_the_openai_client(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], temperature=0, max_completion_tokens=5
    )
    assert reply.model == MODEL
    assert reply.system_fingerprint == "fake-1"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == expected_text(HI, 5)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (len(HI), 5, 14)


def test_a_chat_stream_with_the_openai_client(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            temperature=0,
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    first, *middle, finish, last = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == expected_text(HI, 5)
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in middle)
    assert (finish.choices[0].finish_reason, finish.choices[0].delta.content) == ("length", None)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(HI), 5)
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1


def test_a_completion_with_the_openai_client(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt="hi", temperature=0, max_tokens=5)
    assert reply.choices[0].text == expected_text("hi", 5)
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2, 5)


def test_a_completion_stream_with_the_openai_client(url: str) -> None:
    # Not with strict validation: the client has no null finish_reason for completions, which OpenAI itself sends.
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(client.completions.create(model=MODEL, prompt="hi", temperature=0, max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected_text("hi", 5)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_models_with_the_openai_client(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).owned_by == "fake"


def test_errors_with_the_openai_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("fake/mode")
    assert missing.value.code == "model_not_found"
    assert "did you mean fake/model" in missing.value.message
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], modalities=["audio"])
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "modalities")


def test_every_reply_tells_runner_and_route(http: httpx.Client) -> None:
    for reply in (
        chat(http),
        chat(http, stream=True),
        complete(http),
        complete(http, stream=True),
        complete(http, prompt="x" * 5000),
    ):
        assert reply.headers["x-exo-runner"] == "cuda"
        assert reply.headers["x-exo-route"] == "card prefers LlamaCppCpu, which is available"


def test_a_runner_may_be_wished_for(http: httpx.Client) -> None:
    reply = chat(http, model=f"{MODEL}@cuda")
    assert reply.json()["model"] == MODEL
    assert reply.headers["x-exo-route"].startswith("request asks for runner cuda")
    assert error(chat(http, model=f"{MODEL}@nothing")) == (400, "runner_not_found", "model")


def test_choices_differ_by_seed_and_each_can_be_had_alone(http: httpx.Client) -> None:
    together = texts(complete(http, seed=7, n=3))
    alone = [texts(complete(http, seed=seed))[0] for seed in (7, 8, 9)]
    assert together == alone
    assert len(set(together)) == 3


def test_the_last_seed_wraps_around(http: httpx.Client) -> None:
    assert texts(complete(http, seed=-1)) == texts(complete(http, seed=(1 << 64) - 1))
    assert texts(complete(http, seed=-1, n=2))[1] == texts(complete(http, seed=0))[0]


def test_without_a_seed_every_request_is_another(http: httpx.Client) -> None:
    assert texts(complete(http, max_tokens=30)) != texts(complete(http, max_tokens=30))


def test_several_prompts_times_several_choices(http: httpx.Client) -> None:
    reply = complete(http, prompt=["hi", "hello"], n=2, seed=1)
    assert texts(reply) == texts(complete(http, n=2, seed=1)) + texts(complete(http, prompt="hello", n=2, seed=1))
    assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1, 2, 3]
    usage = reply.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 32, 39)


def test_prompts_as_token_ids(http: httpx.Client) -> None:
    assert texts(complete(http, prompt=list(b"hi"), temperature=0)) == [expected_text("hi", 8)]
    both = complete(http, prompt=[list(b"hi"), list(b"yo")], temperature=0)
    assert texts(both) == [expected_text("hi", 8), expected_text("yo", 8)]


def test_stop_strings_end_a_choice_and_are_not_shown(http: httpx.Client) -> None:
    text = expected_text("hi", 8)
    reply = complete(http, temperature=0, stop=text[3:5])
    assert texts(reply) == [text[:3]]
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    assert reply.json()["usage"]["completion_tokens"] == 5


def test_a_model_may_end_by_itself_unless_told_to_go_on(http: httpx.Client) -> None:
    ended = complete(http, model="fake/eos")
    assert ended.json()["choices"][0]["finish_reason"] == "stop"
    assert len(texts(ended)[0]) == 3
    assert len(texts(complete(http, model="fake/eos", ignore_eos=True))[0]) == 8


def test_the_request_beats_the_card_and_the_card_beats_the_default(http: httpx.Client) -> None:
    by_card = [texts(complete(http, model="fake/greedy", seed=seed)) for seed in (1, 2)]
    assert by_card == [[expected_text("hi", 8)]] * 2
    by_request = texts(complete(http, model="fake/greedy", temperature=1, seed=1))
    assert by_request == texts(complete(http, seed=1)) != by_card[0]


def test_null_and_fields_without_effect_change_nothing(http: httpx.Client) -> None:
    fields = {"temperature": None, "stop": None, "n": None, "grammar": None, "user": "me", "metadata": {"a": "b"}}
    assert texts(complete(http, seed=3, **fields)) == texts(complete(http, seed=3))


def test_special_tokens_in_a_message_are_literal_and_in_a_template_are_not(http: httpx.Client) -> None:
    written = chat(http, model="fake/literal", messages=[{"role": "user", "content": "<eos>"}])
    assert written.json()["usage"]["prompt_tokens"] == 5
    assert chat(http, model="fake/special").json()["usage"]["prompt_tokens"] == 1


def test_a_prompt_of_a_completion_is_tokenized_as_it_is(http: httpx.Client) -> None:
    assert complete(http, prompt="<eos>").json()["usage"]["prompt_tokens"] == 1


def test_token_ids_that_the_model_does_not_have(http: httpx.Client) -> None:
    assert error(complete(http, prompt=[1, 258])) == (400, "invalid_value", "prompt")
    assert error(chat(http, logit_bias={"258": 1})) == (400, "invalid_value", "logit_bias")
    assert chat(http, logit_bias={"257": 1}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context(http: httpx.Client, stream: bool) -> None:
    long = [{"role": "user", "content": "x" * 20}]
    refused = chat(http, model="fake/short", messages=long, stream=stream)
    assert error(refused) == (400, "context_length_exceeded", "messages")
    refused = complete(http, model="fake/short", prompt=["x", "y" * 20], stream=stream)
    assert error(refused) == (400, "context_length_exceeded", "prompt.1")
    refused = complete(http, model="fake/short", prompt=[1] * 20, stream=stream)
    assert error(refused) == (400, "context_length_exceeded", "prompt")


def test_thousands_of_special_tokens_in_a_message(http: httpx.Client) -> None:
    reply = chat(http, messages=[{"role": "user", "content": "<eos>." * 500_000}])
    assert error(reply) == (400, "context_length_exceeded", "messages")


def test_an_empty_prompt_is_refused_by_the_runner(http: httpx.Client) -> None:
    assert error(complete(http, prompt="")) == (400, "invalid_request", "prompt")


def test_a_conversation_that_the_template_refuses(http: httpx.Client) -> None:
    reply = chat(http, messages=[{"role": "assistant", "content": "x"}])
    assert error(reply) == (400, "invalid_value", "messages")
    assert reply.json()["error"]["message"] == "the last message must be the user's"


def test_a_character_that_serves_as_a_mark(http: httpx.Client) -> None:
    reply = chat(http, messages=[{"role": "user", "content": "a\ufdd0b"}])
    assert error(reply) == (400, "invalid_value", "messages")


def test_a_model_without_chat_template_refuses_a_chat_and_says_what_to_do(http: httpx.Client) -> None:
    reply = chat(http, model="fake/greedy")
    assert error(reply) == (400, "no_chat_template", "model")
    assert "chat_template" in reply.json()["error"]["message"]
    assert "/v1/completions" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_hostile_templates_are_an_error_and_the_server_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr("exo.chat.template.renderer.LIMITS", replace(LIMITS, seconds=1))
    monkeypatch.setattr("exo.api.http.response.GRACE_SECONDS", 60)
    templates = {
        "fake/endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "fake/bomb": "{{ 'x' * 10**9 }}",
        "fake/escape": "{{ raise_exception.__globals__['sys'] }}",
    }
    cards = [fake_card(name, chat_template=template) for name, template in templates.items()]
    good = fake_card(MODEL, chat_template=CHAT_TEMPLATE)
    with serve(tmp_path, good, *cards) as url, httpx.Client(base_url=url, timeout=60) as http:
        for name in templates:
            assert error(chat(http, model=name, stream=stream)) == (400, "template_error", "messages")
            assert chat(http, stream=stream).status_code == 200
