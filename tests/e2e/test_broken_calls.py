"""A model of llama.cpp's that writes a call which cannot be read, and what each dialect makes of it over HTTP."""

import json
from collections.abc import Generator
from typing import Any

import pytest

from tests.support.server import ServeProgram, write_card
from tests.support.tiny import write_scripted
from tests.support.tiny.tool_template import TEMPLATE

PIECES = ("<tool_call>\n", '{"name": "paint", ', '"arguments": {"colour": "red", ', '"size": big}}', "\n</tool_call>")
TEXT = "".join(PIECES)
SCHEMA = {"type": "object", "properties": {"colour": {"type": "string"}, "size": {"type": "integer"}}}
FUNCTION = {"name": "paint", "description": "Paints.", "parameters": SCHEMA}
CHAT = {"tools": [{"type": "function", "function": FUNCTION}], "temperature": 0}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_scripted(home / "broken.gguf", PIECES)
    table = {"path": str(home / "broken.gguf"), "n_ctx": 2048, "slots": 1, "threads": 1, "chat_template": TEMPLATE}
    write_card(home, "broken", {"cuda": table}, backends=["LlamaCppCpu"])
    with ServeProgram(home) as server:
        yield server


def post(server: ServeProgram, path: str, **body: object) -> dict[str, Any]:
    reply = server.client.post(path, json={"model": "broken", **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(server: ServeProgram, path: str, **body: object) -> list[dict[str, Any]]:
    reply = server.client.post(path, json={"model": "broken", "stream": True, **body})
    assert reply.status_code == 200, reply.text
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_a_chat(server: ServeProgram) -> None:
    choice = post(server, "/v1/chat/completions", messages=HI, **CHAT)["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", TEXT)
    assert "tool_calls" not in choice["message"]


def test_a_streamed_chat(server: ServeProgram) -> None:
    choices = [chunk["choices"][0] for chunk in stream(server, "/v1/chat/completions", messages=HI, **CHAT)]
    assert choices[-1]["finish_reason"] == "stop"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT
    calls = [call["function"] for choice in choices for call in choice["delta"].get("tool_calls", ())]
    with pytest.raises(json.JSONDecodeError):
        json.loads("".join(call["arguments"] for call in calls))


@pytest.mark.parametrize("tokens", range(1, 4))
def test_a_chat_that_the_limit_cuts_off_shows_no_markup(server: ServeProgram, tokens: int) -> None:
    choice = post(server, "/v1/chat/completions", messages=HI, max_tokens=tokens, **CHAT)["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"] or "") == ("length", "")


def test_anthropics_messages(server: ServeProgram) -> None:
    tools = [{"name": "paint", "input_schema": SCHEMA}]
    body = {"messages": HI, "max_tokens": 100, "temperature": 0, "tools": tools}
    whole = post(server, "/v1/messages", **body)
    assert (whole["stop_reason"], whole["content"]) == ("end_turn", [{"type": "text", "text": TEXT}])
    events = stream(server, "/v1/messages", **body)
    blocks = {event["index"]: event["content_block"] for event in events if event["type"] == "content_block_start"}
    stopped = [blocks[event["index"]]["type"] for event in events if event["type"] == "content_block_stop"]
    assert [block["type"] for block in blocks.values()] == ["tool_use", "text"]
    assert stopped == ["text"]
    assert events[-1]["type"] == "error"


def test_responses(server: ServeProgram) -> None:
    body = {"input": "hi", "temperature": 0, "tools": [{"type": "function", **FUNCTION}]}
    whole = post(server, "/v1/responses", **body)
    assert [item["type"] for item in whole["output"]] == ["message"]
    assert whole["output"][0]["content"][0]["text"] == TEXT
    events = stream(server, "/v1/responses", **body)
    assert not any(event["type"] == "response.function_call_arguments.done" for event in events)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [(item["type"], item["status"]) for item in done] == [
        ("function_call", "incomplete"),
        ("message", "completed"),
    ]


def test_ollamas_chat(server: ServeProgram) -> None:
    body = {"messages": HI, "options": {"temperature": 0}, "tools": CHAT["tools"]}
    whole = post(server, "/api/chat", stream=False, **body)
    assert whole["message"] == {"role": "assistant", "content": TEXT}
    lines = stream(server, "/api/chat", **body)
    assert not any("tool_calls" in line["message"] for line in lines)
    assert "".join(line["message"]["content"] for line in lines) == TEXT
