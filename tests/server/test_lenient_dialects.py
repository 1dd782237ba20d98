"""What Claude Code, Ollama's clients and their histories send: served, with a warning where it has no effect."""

from collections.abc import Generator
from typing import Any

import httpx
import pytest
from pydantic import JsonValue

from exo.api.anthropic.history import readable
from exo.api.anthropic.request import MessagesRequest
from exo.api.http.middleware import WARNING_HEADER
from exo.serving.pictures.prompt_pictures import UNSEEN
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve

MODEL = "fake/model"
PICTURE: dict[str, Any] = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "eA=="}}
USER: dict[str, Any] = {"role": "user", "content": "hi"}
TOOL: dict[str, Any] = {"name": "look", "input_schema": {"type": "object"}}
CALL: dict[str, Any] = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {}}]}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    with serve(tmp_path_factory.mktemp("lenient"), fake_card(MODEL, chat_template=CHAT_TEMPLATE)) as url:
        yield url


def ask(url: str, path: str, **fields: object) -> httpx.Response:
    usual: dict[str, Any] = {"messages": [USER], "stream": False} if path.startswith("/api/") else {"messages": [USER]}
    return httpx.post(url + path, json={"model": MODEL, **usual, **fields}, timeout=60)


def messages(url: str, **fields: object) -> httpx.Response:
    return ask(url, "/v1/messages", **{"max_tokens": 3, **fields})


def result(content: object) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t1", "content": content}


WITHOUT_EFFECT: dict[str, tuple[dict[str, Any], str]] = {
    "context_management": ({"context_management": {"edits": []}}, "context_management"),
    "thread": ({"thread": {"type": "create"}}, "thread"),
    "container": ({"container": "c"}, "container"),
    "mcp_servers": ({"mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]}, "mcp_servers"),
    "speed": ({"speed": "fast"}, "speed"),
    "task_budget": ({"output_config": {"task_budget": {"type": "tokens", "total": 9}}}, "output_config.task_budget"),
    "defer_loading": ({"tools": [{**TOOL, "defer_loading": True}]}, "tools.defer_loading"),
    "allowed_callers": ({"tools": [{**TOOL, "allowed_callers": ["x"]}]}, "tools.allowed_callers"),
    "input_examples": ({"tools": [{**TOOL, "input_examples": [{}]}]}, "tools.input_examples"),
    "vendor tool": ({"tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}]}, "tools.web_search_2025"),
    "citations": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "citations": [{}]}]}]},
        "messages.content.citations",
    ),
}
SILENT: dict[str, dict[str, Any]] = {
    "nothing asked for": {"mcp_servers": [], "container": None, "speed": "standard"},
    "metadata": {"metadata": {"user_id": "u" * 2000}, "service_tier": "priority"},
    "cache_control": {
        "cache_control": {"type": "ephemeral"},
        "system": [
            {"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"}}
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "", "cache_control": None}]},
            USER,
        ],
    },
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_claude_code_sends_is_served_with_a_warning(url: str, name: str) -> None:
    fields, param = WITHOUT_EFFECT[name]
    if "tools" in fields:
        fields = {**fields, "tool_choice": {"type": "none"}}
    reply = messages(url, **fields)
    assert reply.status_code == 200, reply.text
    assert param in reply.headers[WARNING_HEADER]
    assert reply.json()["usage"]["cache_creation_input_tokens"] == 0


@pytest.mark.parametrize("name", SILENT)
def test_what_asks_for_nothing_is_served_in_silence(url: str, name: str) -> None:
    reply = messages(url, **SILENT[name])
    assert (reply.status_code, reply.headers.get(WARNING_HEADER)) == (200, None), reply.text


def test_tokens_are_counted_for_the_body_of_a_message(url: str) -> None:
    reply = ask(url, "/v1/messages/count_tokens", max_tokens=5, stream=True, metadata={}, temperature=1)
    assert reply.status_code == 200
    assert "max_tokens: has no effect here" in reply.headers[WARNING_HEADER]


def test_a_tool_that_is_left_out_cannot_be_chosen(url: str) -> None:
    tools = [TOOL, {"type": "web_search_20250305", "name": "web_search"}]
    reply = messages(url, tools=tools, tool_choice={"type": "tool", "name": "web_search"})
    assert reply.status_code == 400
    assert "tool_choice.name: there is no such tool; given are look" in reply.text


HISTORY: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "eA=="}, *CALL["content"]]},
    {"role": "user", "content": [result([{"type": "text", "text": "seen"}, PICTURE])]},
    {"role": "assistant", "content": [{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}]},
    {"role": "user", "content": "go on"},
]


def test_a_picture_in_an_earlier_result_does_not_end_the_session(url: str) -> None:
    reply = messages(url, messages=HISTORY, tools=[TOOL], tool_choice={"type": "none"})
    assert reply.status_code == 200, reply.text
    assert "messages.content.image: the model reads" in reply.headers[WARNING_HEADER]
    followed: list[dict[str, Any]] = [
        USER,
        CALL,
        {"role": "user", "content": [result([PICTURE]), {"type": "text", "text": "and?"}]},
    ]
    assert messages(url, messages=followed).status_code == 200


@pytest.mark.parametrize(
    ("last", "param"),
    [
        ([{"type": "text", "text": "what is it?"}, PICTURE], "messages.2.content.1.source"),
        ([result([PICTURE])], "messages.2.content.0.content.0.source"),
    ],
)
def test_a_picture_that_the_reply_is_about_is_refused_by_name(url: str, last: object, param: str) -> None:
    reply = messages(url, messages=[USER, CALL, {"role": "user", "content": last}])
    assert reply.status_code == 400
    assert f"'{param}' needs vision" in reply.text


def test_blocks_that_are_text_in_other_words_are_read() -> None:
    document = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "abc"}}
    found = {"type": "search_result", "title": "F", "source": "s", "content": [{"type": "text", "text": "xyz"}]}
    told: list[dict[str, Any]] = [
        USER,
        CALL,
        {"role": "user", "content": [result([{"type": "tool_reference", "tool_name": "look"}, found]), document]},
    ]
    body = MessagesRequest.model_validate({"model": "m", "max_tokens": 1, "messages": told})
    *_, answer, said = body.conversation().messages
    assert answer["content"] == "[tool look]\nF\ns\nxyz"
    assert said["content"] == "T\nabc"


def test_what_is_no_conversation_is_left_as_it_is() -> None:
    values: list[JsonValue] = [None, 3, [None], [[]], [{"role": "user"}], [{"content": [3, {"type": 4}]}]]
    for value in values:
        assert readable(value) == value


OLLAMA: dict[str, tuple[dict[str, Any], str]] = {
    **{
        name: ({"options": {name: value}}, f"options.{name}")
        for name, value in {
            "num_keep": 5,
            "num_thread": 8,
            "num_gpu": 99,
            "num_batch": 512,
            "mirostat": 1,
            "low_vram": True,
            "draft_num_predict": 4,
            "num_ctx": 1 << 20,
        }.items()
    },
    **{name: ({name: True}, name) for name in ("truncate", "shift", "max_output_tokens", "tool_choice")},
}


@pytest.mark.parametrize("name", OLLAMA)
def test_options_and_fields_that_ollama_knows_or_ignores(url: str, name: str) -> None:
    fields, param = OLLAMA[name]
    options = {"num_predict": 2, **fields.get("options", {})}
    for path in ("/api/chat", "/api/generate"):
        reply = ask(url, path, **{"prompt": "x", **fields, "options": options})
        assert reply.status_code == 200, (path, reply.text)
        assert f"{param}: " in reply.headers[WARNING_HEADER]


@pytest.mark.parametrize("form", ["5m", "-1", "300", -1, 0.5, "1h30m", 10**12, "-5m", "0"])
def test_every_form_of_keep_alive(url: str, form: object) -> None:
    reply = ask(url, "/api/chat", keep_alive=form, options={"num_predict": 1})
    assert reply.status_code == 200, reply.text


def test_pictures_in_ollamas_messages(url: str) -> None:
    picture = {**USER, "images": ["eA=="]}
    reply = ask(
        url, "/api/chat", messages=[picture, {"role": "assistant", "content": "x"}, USER], options={"num_predict": 1}
    )
    assert reply.status_code == 200, reply.text
    assert UNSEEN in reply.headers[WARNING_HEADER]
    refused = ask(url, "/api/chat", messages=[USER, picture])
    assert (refused.status_code, "'messages.1.images.0' needs vision" in refused.text) == (400, True)


def test_a_result_may_name_its_tool_by_the_older_field(url: str) -> None:
    call: dict[str, Any] = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    told: list[dict[str, Any]] = [USER, call, {"role": "tool", "name": "look", "content": "seen"}]
    reply = ask(url, "/api/chat", messages=told, options={"num_predict": 1})
    assert (reply.status_code, reply.headers.get(WARNING_HEADER)) == (200, None), reply.text


def test_an_embedding_of_nothing_is_nothing(url: str) -> None:
    given: list[dict[str, Any]] = [{}, {"input": ""}, {"input": []}]
    for fields in given:
        reply = httpx.post(f"{url}/api/embed", json={"model": MODEL, **fields}, timeout=60)
        assert (reply.status_code, reply.json()["embeddings"]) == (200, []), reply.text
