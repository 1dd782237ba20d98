"""Anthropic's API over a real server: with Anthropic's own client, and its faults with plain HTTP."""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import (
    Message,
    MessageParam,
    OutputConfigParam,
    TextBlock,
    ThinkingBlock,
    ThinkingConfigParam,
    ToolParam,
    ToolUseBlock,
)
from pydantic import BaseModel

from exo.cards.card import SamplingDefaults
from exo.chat.template.reshaping import short_id
from exo.config import Access, ApiKey
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, TOOLS_TEMPLATE, serve
from tests.support.fake_model import expected_text

MODEL = "fake/model"
USER_HI: list[MessageParam] = [{"role": "user", "content": "hi"}]
HI = "user: hi\n"
"""What the template makes of it: as many tokens as it has characters."""
TOOL: ToolParam = {
    "name": "count",
    "description": "Counts.",
    "input_schema": {"type": "object", "properties": {"to": {"type": "integer"}}, "required": ["to"]},
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    cards = [
        fake_card(MODEL, chat_template=CHAT_TEMPLATE),
        fake_card("fake/tools", chat_template=TOOLS_TEMPLATE),
        fake_card("fake/told", chat_template="{{ raise_exception(messages | tojson) }}"),
        fake_card("fake/eos", chat_template=CHAT_TEMPLATE, eos_after=3),
        fake_card("fake/dies", chat_template=CHAT_TEMPLATE, die_at=3),
    ]
    greedy = SamplingDefaults(temperature=0.0)
    with serve(
        tmp_path_factory.mktemp("server"), *(card.model_copy(update={"sampling_defaults": greedy}) for card in cards)
    ) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Generator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


def post(url: str, **fields: object) -> httpx.Response:
    body = {"model": MODEL, "messages": USER_HI, "max_tokens": 4, **fields}
    body = {name: value for name, value in body.items() if value != "left out"}
    return httpx.post(f"{url}/v1/messages", json=body, timeout=60)


def refused(url: str, **fields: object) -> str:
    reply = post(url, **fields)
    assert reply.status_code == 400, reply.text
    assert reply.headers["request-id"].startswith("req_")
    body = reply.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    return body["error"]["message"]


def test_a_message(client: anthropic.Anthropic) -> None:
    raw = client.messages.with_raw_response.create(
        model=MODEL, max_tokens=5, messages=USER_HI, metadata={"user_id": "me"}
    )
    reply = raw.parse()
    assert reply.content == [TextBlock(type="text", text=expected_text(HI, 5))]
    assert (reply.model, reply.role, reply.type) == (MODEL, "assistant", "message")
    assert (reply.stop_reason, reply.stop_sequence) == ("max_tokens", None)
    assert (reply.usage.input_tokens, reply.usage.cache_read_input_tokens, reply.usage.output_tokens) == (len(HI), 0, 5)
    assert raw.headers["x-exo-runner"] == "cuda"
    assert raw.headers["request-id"].startswith("req_")
    assert "x-exo-warning" not in raw.headers


def test_a_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model=MODEL, max_tokens=5, messages=USER_HI) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert [event.type for event in events if event.type not in ("text", "content_block_delta")] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0].type == "message_start"
    assert events[0].message.usage.input_tokens == len(HI)
    assert "".join(event.text for event in events if event.type == "text") == expected_text(HI, 5)
    assert [block.text for block in final.content if block.type == "text"] == [expected_text(HI, 5)]
    assert (final.stop_reason, final.usage.input_tokens, final.usage.output_tokens) == ("max_tokens", len(HI), 5)


def test_values_that_mean_none_or_all_are_accepted(client: anthropic.Anthropic, url: str) -> None:
    def text(**fields: object) -> object:
        body = {"model": MODEL, "max_tokens": 5, "messages": USER_HI, **fields}
        reply = httpx.post(f"{url}/v1/messages", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        return reply.json()["content"]

    assert text(top_p=0) == text(temperature=0)
    assert text(temperature=0, top_k=-1, stop_sequences="") == text(temperature=0)
    assert text(temperature=0, stop_sequences=["", "nowhere to be found"]) == text(temperature=0)
    assert text(model="fake/eos", max_tokens=-1) == text(model="fake/eos", max_tokens=40)
    full = client.messages.create(model=MODEL, max_tokens=-1, messages=USER_HI)
    assert full.stop_reason == "model_context_window_exceeded"


def test_why_a_message_ends(client: anthropic.Anthropic) -> None:
    whole = expected_text(HI, 40)
    stop = whole[10:13]
    reply = client.messages.create(model=MODEL, max_tokens=40, stop_sequences=[stop], messages=USER_HI)
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", stop)
    assert reply.content == [TextBlock(type="text", text=whole[: whole.index(stop)])]
    assert client.messages.create(model="fake/eos", max_tokens=40, messages=USER_HI).stop_reason == "end_turn"
    full = client.messages.create(model=MODEL, max_tokens=9999, messages=USER_HI)
    assert full.stop_reason == "model_context_window_exceeded"


def test_a_prompt_may_be_computed_and_no_more(client: anthropic.Anthropic) -> None:
    reply = client.messages.create(model=MODEL, max_tokens=0, messages=USER_HI)
    assert (reply.content, reply.stop_reason, reply.usage.output_tokens) == ([], "max_tokens", 0)


def test_an_asked_for_call_whole_and_streamed(client: anthropic.Anthropic) -> None:
    reply = client.messages.create(
        model="fake/tools", max_tokens=400, messages=USER_HI, tools=[TOOL], tool_choice={"type": "any"}
    )
    (call,) = reply.content
    assert isinstance(call, ToolUseBlock)
    assert (call.name, reply.stop_reason) == ("count", "tool_use")
    assert list(call.input) == ["to"]
    assert isinstance(call.input["to"], int)
    with client.messages.stream(
        model="fake/tools",
        max_tokens=400,
        messages=USER_HI,
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "count", "disable_parallel_tool_use": True},
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    (call,) = final.content
    assert isinstance(call, ToolUseBlock)
    assert len(pieces) > 1
    assert isinstance(call.input["to"], int)
    assert final.stop_reason == "tool_use"


def test_a_schema_is_followed(client: anthropic.Anthropic) -> None:
    class Answer(BaseModel):
        count: int

    reply = client.messages.parse(model=MODEL, max_tokens=100, messages=USER_HI, output_format=Answer)
    assert isinstance(reply.parsed_output, Answer)


def test_reasoning_can_be_switched_on_off_and_left_out(client: anthropic.Anthropic) -> None:
    def ask(
        thinking: ThinkingConfigParam | anthropic.Omit = anthropic.omit,
        output_config: OutputConfigParam | anthropic.Omit = anthropic.omit,
    ) -> Message:
        return client.messages.create(
            model="fake/tools", max_tokens=40, messages=USER_HI, thinking=thinking, output_config=output_config
        )

    on = ask(thinking={"type": "enabled", "budget_tokens": 19})
    thought = expected_text(f"{HI}<think>", 19).strip()
    assert on.content[0] == ThinkingBlock(type="thinking", thinking=thought, signature="")
    assert on.usage.output_tokens_details is not None
    assert on.usage.output_tokens_details.thinking_tokens == 19
    omitted = ask(thinking={"type": "enabled", "budget_tokens": 19, "display": "omitted"})
    assert [block.type for block in omitted.content] == ["text"]
    assert ask(thinking={"type": "disabled"}).content[0].type == "text"
    assert ask(thinking={"type": "adaptive"}).content[0].type == "text"
    assert ask(output_config={"effort": "max"}).content[0].type == "thinking"


def test_a_model_without_reasoning_says_so(url: str) -> None:
    for fields, param in (
        ({"thinking": {"type": "enabled", "budget_tokens": 3}}, "thinking"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
    ):
        reply = post(url, **fields)
        assert reply.status_code == 200
        assert f"{param}: this model does not reason, so it has no effect" in reply.headers["x-exo-warning"]
    assert "x-exo-warning" not in post(url, thinking={"type": "disabled"}).headers


CONVERSATION: list[MessageParam] = [
    {"role": "user", "content": "one"},
    {"role": "user", "content": [{"type": "text", "text": "two", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "from elsewhere"},
            {"type": "text", "text": "I "},
            {"type": "text", "text": "count."},
            {"type": "tool_use", "id": "toolu_A", "name": "count", "input": {"to": 3}},
            {"type": "tool_use", "id": "toolu_B", "name": "halt", "input": {}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "toolu_A", "content": "1 2 3"},
            {
                "type": "tool_result",
                "tool_use_id": "toolu_B",
                "is_error": True,
                "content": [{"type": "text", "text": "no"}],
            },
            {"type": "text", "text": "so?"},
        ],
    },
    {"role": "system", "content": "Be brief."},
]


def test_what_the_template_is_told(url: str) -> None:
    told = json.loads(refused(url, model="fake/told", system="Be kind.", messages=CONVERSATION))
    first, second = (short_id(given) for given in ("toolu_A", "toolu_B"))
    assistant = told.pop(2)
    assert told == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one\ntwo"},
        {"role": "tool", "tool_call_id": first, "content": "1 2 3", "name": "count"},
        {"role": "tool", "tool_call_id": second, "content": "Error: no", "name": "halt"},
        {"role": "user", "content": "so?"},
        {"role": "system", "content": "Be brief."},
    ]
    assert (assistant["content"], assistant["reasoning_content"]) == ("I count.", "hm")
    assert [(call["id"], call["function"]) for call in assistant["tool_calls"]] == [
        (first, {"name": "count", "arguments": {"to": 3}}),
        (second, {"name": "halt", "arguments": {}}),
    ]


def test_count_tokens_counts_what_a_message_uses(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="fake/tools", messages=USER_HI, tools=[TOOL], system="Be kind.")
    used = client.messages.create(model="fake/tools", messages=USER_HI, tools=[TOOL], system="Be kind.", max_tokens=1)
    assert counted.input_tokens == used.usage.input_tokens
    without = client.messages.count_tokens(
        model="fake/tools", messages=USER_HI, tools=[TOOL], system="Be kind.", tool_choice={"type": "none"}
    )
    assert without.input_tokens == len(f"system: Be kind.\n{HI}")


def test_a_last_message_of_the_assistant_is_gone_on_with(client: anthropic.Anthropic) -> None:
    begun: list[MessageParam] = [*USER_HI, {"role": "assistant", "content": "It is"}]
    reply = client.messages.create(model="fake/tools", max_tokens=5, messages=begun)
    assert reply.content == [TextBlock(type="text", text=expected_text(f"{HI}assistant: It is", 5))]


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": "left out"}, "max_tokens: this field is required"),
    ({"messages": []}, "messages: "),
    ({"temperature": 1.5}, "temperature: "),
    ({"top_p": -0.1}, "top_p: "),
    ({"top_k": -2}, "top_k: "),
    ({"max_tokens": -2}, "max_tokens: "),
    ({"max_tokens": None}, "max_tokens: this field is required"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: "),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0.text: "),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.source.type: must be of"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0.type: this field is req"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0: must be an object"),
    (
        {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
        "messages.0.content.0.type: 'thinking' is not for a message of role 'user'",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
        "messages.0.content.0.tool_use_id: there is no tool_use block",
    ),
    ({"messages": CONVERSATION[:3]}, "messages: the last message has tool_use blocks"),
    ({"system": [{"type": "image"}]}, "system.0.type: 'image' is not supported"),
    ({"tools": [None]}, "tools.0: must be a tool"),
    ({"tools": [TOOL, TOOL]}, "tools: two tools have the same name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice: there are no tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name: there is no such tool"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name: this field is required"),
    ({"tool_choice": {"type": "auto", "name": "x"}}, "tool_choice.name: not accepted"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "no"}}}}, "output_config.format.schema"),
    (
        {
            "tools": [TOOL],
            "tool_choice": {"type": "any"},
            "output_config": {"format": {"type": "json_schema", "schema": {}}},
        },
        "tool_choice: not accepted together with output_config.format",
    ),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "prompt is too long: 5007 tokens > 4095 maximum"),
]


@pytest.mark.parametrize(("fields", "message"), FAULTS)
def test_faults_are_named_in_anthropics_envelope(url: str, fields: dict[str, object], message: str) -> None:
    assert refused(url, **fields).startswith(message)


def test_faults_with_anthropics_client(client: anthropic.Anthropic, url: str) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="fake/mode", max_tokens=5, messages=USER_HI)
    assert missing.value.type == "not_found_error"
    assert "did you mean fake/model" in missing.value.message
    with pytest.raises(anthropic.NotFoundError):
        client.messages.count_tokens(model="fake/mode", messages=USER_HI)
    long: list[MessageParam] = [{"role": "user", "content": "x" * 5000}]
    assert client.messages.count_tokens(model=MODEL, messages=long).input_tokens == 5007
    assert httpx.get(f"{url}/v1/messages", timeout=60).json()["error"]["type"] == "invalid_request_error"


def test_a_key_is_asked_for_in_anthropics_way(tmp_path: Path) -> None:
    access = Access(keys=(ApiKey("me", "sesame-sesame"),))
    with serve(tmp_path, fake_card(MODEL, chat_template=CHAT_TEMPLATE), access=access) as url:
        with anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError) as denied:
                client.messages.create(model=MODEL, max_tokens=5, messages=USER_HI)
            assert denied.value.type == "authentication_error"
        with anthropic.Anthropic(base_url=url, api_key="sesame-sesame", max_retries=0) as client:
            assert client.messages.create(model=MODEL, max_tokens=5, messages=USER_HI).usage.output_tokens == 5


def test_a_stream_that_fails_says_so_in_the_stream(client: anthropic.Anthropic) -> None:
    with (
        client.messages.stream(model="fake/dies", max_tokens=50, messages=USER_HI) as stream,
        pytest.raises(anthropic.APIStatusError) as failed,
    ):
        stream.until_done()
    assert failed.value.type in ("overloaded_error", "api_error")
