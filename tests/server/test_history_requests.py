"""One conversation in each dialect, over a real server whose model has a chat template with restrictions."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo.cards.card import SamplingDefaults
from tests.conftest import fake_card
from tests.support.api_server import serve
from tests.support.fake_model import expected_text
from tests.support.templates import FAMILIES

MODEL = "fake/model"
PROMPT = (
    '<system>rules<user>asked<assistant>said{"name": "look", "arguments": {"at": "x"}}<tool>one'
    '{"name": "look", "arguments": {"at": "y"}}<tool>two<user>again<assistant>'
)
SAID = expected_text(PROMPT, 8)
START = [{"role": "system", "content": "rules"}, {"role": "user", "content": "asked"}]
AGAIN = {"role": "user", "content": "again"}
ARGUMENTS = ('{"at": "x"}', '{"at": "y')


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    directory: Path = tmp_path_factory.mktemp("server")
    card = fake_card(MODEL, chat_template=FAMILIES["one call, tools in the first user message"], n_ctx=4096).model_copy(
        update={"sampling_defaults": SamplingDefaults(temperature=0.0)}
    )
    with serve(directory, card) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def post(http: httpx.Client, path: str, **fields: object) -> dict[str, Any]:
    reply = http.post(path, json={"model": MODEL, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_openai_chat(http: httpx.Client) -> None:
    calls = [
        {"id": f"call_{at}", "type": "function", "function": {"name": "look", "arguments": text}}
        for at, text in enumerate(ARGUMENTS)
    ]
    results = [
        {"role": "tool", "tool_call_id": f"call_{at}", "content": text} for at, text in enumerate(("one", "two"))
    ]
    messages = [*START, {"role": "assistant", "content": "said", "tool_calls": calls}, *results, AGAIN]
    reply = post(http, "/v1/chat/completions", messages=messages, max_tokens=8)
    assert reply["choices"][0]["message"]["content"] == SAID


def test_responses(http: httpx.Client) -> None:
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "said"}]}
    calls = [
        {"type": "function_call", "call_id": f"call_{at}", "name": "look", "arguments": text}
        for at, text in enumerate(ARGUMENTS)
    ]
    results = [
        {"type": "function_call_output", "call_id": f"call_{at}", "output": text}
        for at, text in enumerate(("one", "two"))
    ]
    reply = post(http, "/v1/responses", input=[*START, said, *calls, *results, AGAIN], max_output_tokens=8)
    assert reply["output"][0]["content"][0]["text"] == SAID


def test_anthropic(http: httpx.Client) -> None:
    calls = [{"type": "tool_use", "id": f"toolu_{at}", "name": "look", "input": {"at": at}} for at in ("x", "y")]
    results = [
        {"type": "tool_result", "tool_use_id": f"toolu_{at}", "content": text}
        for at, text in (("x", "one"), ("y", "two"))
    ]
    messages = [
        {"role": "user", "content": "asked"},
        {"role": "assistant", "content": [{"type": "text", "text": "said"}, *calls]},
        {"role": "user", "content": [*results, {"type": "text", "text": "again"}]},
    ]
    reply = post(http, "/v1/messages", system="rules", messages=messages, max_tokens=8)
    assert reply["content"][0]["text"] == SAID


def test_ollama(http: httpx.Client) -> None:
    calls = [{"function": {"name": "look", "arguments": {"at": at}}} for at in ("x", "y")]
    results = [{"role": "tool", "tool_name": "look", "content": text} for text in ("one", "two")]
    messages = [*START, {"role": "assistant", "content": "said", "tool_calls": calls}, *results, AGAIN]
    reply = post(http, "/api/chat", messages=messages, stream=False, options={"num_predict": 8})
    assert reply["message"]["content"] == SAID


def test_a_late_system_message_is_taken_in_each_dialect(http: httpx.Client) -> None:
    late = [*START, {"role": "assistant", "content": "said"}, {"role": "system", "content": "late"}, AGAIN]
    assert post(http, "/v1/chat/completions", messages=late, max_tokens=8)
    assert post(http, "/v1/responses", input=late, max_output_tokens=8)
    assert post(http, "/v1/messages", messages=late[1:], max_tokens=8)
    assert post(http, "/api/chat", messages=late, stream=False, options={"num_predict": 8})


def test_a_billing_line_does_not_change_the_prompt(http: httpx.Client) -> None:
    def ask(*system: str) -> dict[str, Any]:
        blocks = [{"type": "text", "text": text} for text in system]
        return post(http, "/v1/messages", system=blocks, messages=START[1:], max_tokens=8)

    plain, *billed = (
        ask(*before, "You are Claude Code.")
        for before in ((), ("x-anthropic-billing-header: cch=1;",), ("x-anthropic-billing-header: cch=23456;",))
    )
    assert [each["content"] for each in billed] == [plain["content"]] * 2
    assert all(
        each["usage"]["input_tokens"] + each["usage"]["cache_read_input_tokens"]
        == plain["usage"]["input_tokens"] + plain["usage"]["cache_read_input_tokens"]
        for each in billed
    )
