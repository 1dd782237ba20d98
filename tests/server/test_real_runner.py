"""The APIs of Anthropic and Ollama with llama.cpp behind them, by their own clients."""

import json
from collections.abc import Iterator

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam
from pydantic import JsonValue

from tests.server.test_anthropic import TOOL, USER_HI
from tests.server.test_ollama import chat, connected, streamed
from tests.support.api_server import TOOLS_TEMPLATE
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_gguf(home / "twin.gguf", Shape())
    path = str(home / "twin.gguf")
    table: dict[str, JsonValue] = {"path": path, "threads": 1, "n_ctx": 2048, "chat_template": TOOLS_TEMPLATE}
    write_card(home, "twin", {"cuda": table})
    with ServeProgram(home) as program:
        yield program


def test_anthropics_client(server: ServeProgram) -> None:
    with anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        greedy = {"temperature": 0}  # which the client has no parameter for
        long: list[MessageParam] = [{"role": "user", "content": "once upon a time " * 20}]  # worth keeping
        first = client.messages.create(model="twin", max_tokens=12, messages=long, extra_body=greedy)
        with client.messages.stream(model="twin", max_tokens=12, messages=long, extra_body=greedy) as stream:
            assert [block.to_dict() for block in stream.get_final_message().content] == [
                block.to_dict() for block in first.content
            ]
            again = stream.get_final_message().usage
        assert (again.cache_read_input_tokens or 0) > 0
        counted = client.messages.count_tokens(model="twin", messages=long).input_tokens
        assert again.input_tokens + (again.cache_read_input_tokens or 0) == counted
        # Weights are random: a call of one integer ends soon, whatever is sampled.
        only_to: ToolParam = {**TOOL, "input_schema": {**TOOL["input_schema"], "additionalProperties": False}}
        call = client.messages.create(
            model="twin",
            max_tokens=1500,
            messages=USER_HI,
            tools=[only_to],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            extra_body={"seed": 1},
        )
        assert call.stop_reason == "tool_use"
        assert [block.name for block in call.content if block.type == "tool_use"] == ["count"]


def test_ollamas_client(server: ServeProgram) -> None:
    options = {"num_predict": 12, "temperature": 0}
    schema = {"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"], "additionalProperties": False}
    with connected(server.url) as client:
        whole = chat(client, "twin:latest", options=options)
        assert whole.eval_count == 12
        hot = {"num_predict": 12, "temperature": 2.0, "seed": 7}
        assert chat(client, "twin", options=hot).message.content != whole.message.content
        assert chat(client, "twin", options={**hot, "top_p": 0}).message.content == whole.message.content
        pieces = streamed(client, "twin", options=options)
        assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
        raw = client.generate("twin", "once", raw=True, options=options, logprobs=True)
        assert len(raw.logprobs or ()) == 12
        formatted = chat(client, "twin", options={"num_predict": 100, "temperature": 0}, format=schema)
        assert json.loads(formatted.message.content or "") == {"a": "b"}
        first, second = client.embed("twin", ["once", "upon a time"]).embeddings
        assert len(first) == len(second) == 64
        (loaded,) = client.ps().models
        assert (loaded.context_length, loaded.size_vram) == (2048, 0)
