"""Calls of tools over HTTP with chat templates of different families, on a tiny random model and a real runner."""

import json
from collections.abc import Generator, Mapping
from typing import Any

import httpx
import jsonschema_rs
import pytest
from pydantic import JsonValue

from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf

TEMPLATE = (
    "{%% if tools %%}<|im_start|>system\n{{ tools | tojson }}%s<|im_end|>\n{%% endif %%}"
    "{%% for message in messages %%}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)
SHOWN = {
    "nobodys": "Write calls as you like.",
    "apertus": "<|tools_prefix|>[]<|tools_suffix|>",
    "cohere": "<|START_ACTION|>[]<|END_ACTION|>",
    "deepseek-v3.2": "<\uff5cDSML\uff5cfunction_calls>",
    "kimi-k3": "<|open|>tools<|sep|>",
    "lfm2": "<|tool_call_start|>[]<|tool_call_end|>",
    "seed": "<seed:tool_call></seed:tool_call>",
}
"""What the system message of each model says of calls."""
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "size": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_gguf(home / "tiny.gguf", Shape(scale=0.5))
    for name, shown in SHOWN.items():
        table: dict[str, JsonValue] = {"path": str(home / "tiny.gguf"), "threads": 1, "n_ctx": 2048, "slots": 1}
        write_card(home, name, {"cuda": {**table, "chat_template": TEMPLATE % shown}}, backends=["LlamaCppCpu"])
    with ServeProgram(home) as server:
        yield server


def ask(server: ServeProgram, model: str, **fields: object) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "tools": [TOOL], "max_tokens": 300}
    return server.client.post("/v1/chat/completions", json={**body, **fields})


@pytest.mark.parametrize("model", SHOWN)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_forced_call_is_a_call_in_every_format(server: ServeProgram, model: str, choice: object) -> None:
    reply = ask(server, model, tool_choice=choice, parallel_tool_calls=False, seed=1)
    assert reply.status_code == 200, reply.text
    said: Mapping[str, Any] = reply.json()["choices"][0]
    assert said["finish_reason"] == "tool_calls"
    assert not said["message"]["content"]
    (call,) = said["message"]["tool_calls"]
    assert call["function"]["name"] == "paint"
    jsonschema_rs.validate(PARAMETERS, json.loads(call["function"]["arguments"]))


def test_a_template_that_shows_no_known_format_is_told(server: ServeProgram) -> None:
    warning = ask(server, "nobodys", max_tokens=4).headers["x-exo-warning"]
    assert warning.startswith("tools: the chat template of test/nobodys shows no call format that exo knows")
    assert "calls remain part of the text" in warning
    forced = ask(server, "nobodys", tool_choice="required").headers["x-exo-warning"]
    assert "the call is forced as plain JSON" in forced


def test_a_known_format_needs_no_warning(server: ServeProgram) -> None:
    assert "x-exo-warning" not in ask(server, "cohere", max_tokens=4).headers
    assert "x-exo-warning" not in ask(server, "nobodys", tools=[], max_tokens=4).headers
