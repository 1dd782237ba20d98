"""Codex's and the Agents SDK's requests: tools in namespaces, custom tools, and what only OpenAI can run."""

import json
from collections.abc import Generator

import httpx
import pytest
from pydantic import JsonValue, ValidationError

from exo.api.http.errors import from_validation
from exo.api.http.middleware import WARNING_HEADER
from exo.api.http.reply import Call, ReplyChoice
from exo.api.openai.responses.input import InputItem, InputReference, told
from exo.api.openai.responses.request import ResponsesRequest
from exo.api.openai.responses.routes import ResponsesDialect, responses_request
from exo.api.openai.responses.store import ResponseStore
from exo.api.openai.responses.tools import custom_arguments, custom_input
from exo.chat.grammar.tool_schema import NamedChoice
from exo.chat.output.events import Arguments, ToolCall
from exo.serving.events import ChoiceDelta, ChoiceFinished, ChoiceStarted
from exo.serving.pictures.prompt_pictures import UNSEEN
from exo.serving.request import Conversation
from exo.worker.protocol.events import Usage
from tests.conftest import fake_card
from tests.support.api_server import serve

MODEL = "fake/model"
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{# <tool_call> </tool_call> #}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ message.tool_calls or '' }}\n{% endfor %}"
)
USAGE = Usage(prompt_tokens=3, completion_tokens=2)
SHELL: dict[str, JsonValue] = {"type": "function", "name": "exec_command", "parameters": {"type": "object"}}
LOOK: dict[str, JsonValue] = {"type": "function", "name": "look", "parameters": {"type": "object"}}
GRAMMAR: dict[str, JsonValue] = {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch"'}
PATCH: dict[str, JsonValue] = {"type": "custom", "name": "apply_patch", "description": "Edits.", "format": GRAMMAR}
NAMESPACE: dict[str, JsonValue] = {
    "type": "namespace",
    "name": "mcp__maps",
    "description": "Maps.",
    "tools": [LOOK, {"type": "web_search"}],
}
TOOLS: list[JsonValue] = [SHELL, PATCH, NAMESPACE, {"type": "web_search", "external_web_access": True}]


def request(**fields: object) -> ResponsesRequest:
    return ResponsesRequest.model_validate_json(json.dumps({"model": "m", "input": "hi", **fields}))


def refused(**fields: object) -> str:
    with pytest.raises(ValidationError) as caught:
        request(**fields)
    return str(from_validation(caught.value))


def warned(body: ResponsesRequest) -> list[str]:
    return list(dict.fromkeys(param for param, _ in body.notes()))


def given(body: ResponsesRequest) -> list[InputItem]:
    return [item for item in body.input if not isinstance(item, InputReference)]


def dialect(body: ResponsesRequest) -> ResponsesDialect:
    return ResponsesDialect("resp_1", body, given(body), told(given(body)), ResponseStore())


CODEX: dict[str, object] = {
    "instructions": "You are Codex.",
    "input": [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "x"}]}],
    "tools": TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "detailed"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content", "web_search_call.action.sources"],
    "service_tier": "priority",
    "prompt_cache_key": "k" * 1000,
    "client_metadata": {"x-codex-installation-id": "1"},
    "text": {"verbosity": "low"},
    "truncation": "auto",
    "max_tool_calls": 7,
}


def test_codex_request_is_served_and_what_has_no_effect_is_told() -> None:
    body = request(**CODEX)
    assert sorted(warned(body)) == [
        "client_metadata",
        "include",
        "max_tool_calls",
        "reasoning.summary",
        "service_tier",
        "text.verbosity",
        "tools.apply_patch.format",
        "tools.tools.web_search",
        "tools.web_search",
        "truncation",
    ]
    (conversation,) = responses_request(body, told(given(body))).prompts
    assert isinstance(conversation, Conversation)
    assert [tool.name for tool in conversation.tools] == ["exec_command", "apply_patch", "mcp__maps__look"]
    assert (conversation.effort, conversation.effort_param) == ("medium", "reasoning.effort")
    patch = conversation.tools[1]
    assert patch.parameters["required"] == ["input"]
    assert "Begin Patch" in patch.description


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "allowed_tools", "tools": [{"name": "apply_patch"}]}])
def test_a_grammar_that_is_not_enforced_is_told(choice: JsonValue) -> None:
    assert warned(request(tools=[LOOK, PATCH], tool_choice=choice)) == ["tools.apply_patch.format"]


@pytest.mark.parametrize("choice", ["none", {"type": "allowed_tools", "tools": [{"name": "look"}]}])
def test_the_grammar_of_a_tool_that_cannot_be_called_is_not_told_of(choice: JsonValue) -> None:
    assert warned(request(tools=[LOOK, PATCH], tool_choice=choice)) == []


def test_calls_are_given_back_under_the_clients_names_and_types() -> None:
    choice = ReplyChoice(
        calls=[
            Call("mcp__maps__look", '{"a":1}'),
            Call("apply_patch", custom_arguments('*** Begin "é"\n')),
            Call("exec_command", "{}"),
        ],
        reason="tool_calls",
    )
    look, patch, shell = json.loads(dialect(request(tools=TOOLS)).whole([choice], USAGE))["output"]
    assert (look["type"], look["name"], look["namespace"], look["arguments"]) == (
        "function_call",
        "look",
        "mcp__maps",
        '{"a":1}',
    )
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "apply_patch", '*** Begin "é"\n')
    assert patch["id"].startswith("ctc_")
    assert (shell["name"], "namespace" in shell, "arguments" in patch) == ("exec_command", False, False)


def test_a_stream_tells_the_input_of_a_custom_tool_as_text() -> None:
    streamed = dialect(request(tools=TOOLS))
    streamed.write(ChoiceStarted(0))
    text = custom_arguments("*** Begin\n")
    data = streamed.write(ChoiceDelta(0, (ToolCall(0, "apply_patch"), Arguments(0, text[:9])), (7,), ()))
    data += streamed.write(ChoiceFinished(0, (Arguments(0, text[9:]),), "tool_calls", None, USAGE))
    events = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: ")]
    assert [event["type"].removeprefix("response.") for event in events] == [
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
    ]
    assert (events[0]["item"]["input"], events[1]["delta"], events[2]["input"]) == ("", "*** Begin\n", "*** Begin\n")
    assert events[3]["item"]["input"] == "*** Begin\n"


def test_what_is_given_back_is_accepted_as_history_under_the_same_names() -> None:
    choice = ReplyChoice(
        calls=[Call("mcp__maps__look", '{"a":1}'), Call("apply_patch", custom_arguments("x"))], reason="tool_calls"
    )
    output = json.loads(dialect(request(tools=TOOLS)).whole([choice], USAGE))["output"]
    results = [
        {"type": "function_call_output", "call_id": output[0]["call_id"], "output": "7"},
        {
            "type": "custom_tool_call_output",
            "call_id": output[1]["call_id"],
            "output": [{"type": "input_text", "text": "8"}],
        },
    ]
    messages = told(given(request(input=[*output, *results], tools=TOOLS)))
    calls = messages[0]["tool_calls"]
    assert isinstance(calls, list)
    functions = [call["function"] for call in calls if isinstance(call, dict)]
    assert functions == [
        {"name": "mcp__maps__look", "arguments": '{"a":1}'},
        {"name": "apply_patch", "arguments": '{"input":"x"}'},
    ]
    assert [message["content"] for message in messages[1:]] == ["7", "8"]


HISTORY: list[JsonValue] = [
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "s"}], "content": None,
     "encrypted_content": "gAAAA", "status": None},
    {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "x"}},
    {"type": "local_shell_call", "id": "lsh_1", "status": "completed", "action": {"type": "exec", "command": ["ls"]}},
    {"type": "local_shell_call_output", "id": "lsh_1", "output": "a b"},
    {"type": "message", "role": "assistant", "phase": "analysis", "content": [
        {"type": "output_text", "text": "t", "annotations": [], "logprobs": []}, {"type": "refusal", "refusal": "no"}]},
    {"type": None, "role": "user", "content": "hi"},
]  # fmt: skip


def test_a_history_of_openais_own_items() -> None:
    body = request(input=HISTORY)
    messages = told(given(body))
    assert [message["content"] for message in messages] == ["", "a b", "t\nno", "hi"]
    calls = messages[0]["tool_calls"]
    assert isinstance(calls, list)
    assert isinstance(calls[0], dict)
    assert (calls[0]["id"], messages[1]["tool_call_id"]) == ("lsh_1", "lsh_1")
    assert sorted(warned(body)) == ["input.encrypted_content", "input.phase", "input.web_search_call"]


@pytest.mark.parametrize(
    "called",
    [
        {"type": "function_call", "name": "look", "arguments": "{}"},
        {"type": "custom_tool_call", "name": "apply_patch", "input": "x"},
        {"type": "local_shell_call", "action": {}},
    ],
)
def test_a_picture_in_an_earlier_result_does_not_end_the_session(called: dict[str, JsonValue]) -> None:
    picture: JsonValue = [{"type": "input_image", "image_url": "data:"}]
    call, result = ({"call_id": "c", **each} for each in (called, {"type": f"{called['type']}_output"}))
    result["output"] = picture
    user: JsonValue = {"role": "user", "content": "go on"}
    assert refused(input=[call, result]).startswith("input.1.output.0.image_url: a data: URL must have")
    assert told(given(request(input=[call, result, user])))[1]["content"] == UNSEEN
    message = refused(input=[{"role": "user", "content": picture}])
    assert message.startswith("input.0.content.0.image_url: a data: URL must have")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [{"type": "web_search"}, {"type": "function"}]}, "tools.1.name: this field is required"),
        ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice.type: only functions and custom tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "look"}}, "tool_choice: there is no tool 'look'"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "name": "apply_patch"}}, "tool_choice: the grammar of a"),
        ({"tools": [LOOK, LOOK]}, "tools: two tools have the same name, 'look'"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice: there are no tools"),
        ({"input": [{"type": "web_search_call"}, {"type": "sound"}]}, "input.1.type: an item's type is one of"),
        ({"background": True}, "background: not supported"),
        ({"conversation": "conv_1"}, "conversation: not supported"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort: "),
    ],
)
def test_faults_are_named_where_they_are(fields: dict[str, object], message: str) -> None:
    assert refused(**fields)[: len(message)] == message


def test_a_choice_names_a_tool_of_a_namespace_or_some_tools() -> None:
    choice = {"type": "function", "namespace": "mcp__maps", "name": "look"}
    body = request(tools=TOOLS, tool_choice=choice)
    assert body.choice == NamedChoice("mcp__maps__look")
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "exec_command"}]}
    some = request(tools=TOOLS, tool_choice=allowed)
    assert (some.choice, [tool.name for tool in some.callable_tools]) == ("required", ["exec_command"])


def test_a_demanded_call_takes_the_place_of_a_text_format() -> None:
    format_ = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
    body = request(tools=[LOOK], tool_choice={"type": "function", "name": "look"}, text={"format": format_})
    assert warned(body) == ["text.format"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [('{"input":"a\\nb"}', "a\nb"), ('{"input":"a', "a"), ('{"other":1}', '{"other":1}'), ("", "")],
)
def test_the_input_of_a_custom_tool(arguments: str, text: str) -> None:
    assert custom_input(arguments) == text


# --- through HTTP ---


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    with (
        serve(tmp_path_factory.mktemp("server"), fake_card(MODEL, chat_template=TEMPLATE, eos_after=5)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def test_codex_gets_its_stream(client: httpx.Client) -> None:
    reply = client.post("/v1/responses", json={"model": MODEL, **CODEX, "reasoning": {"summary": "auto"}})
    assert reply.status_code == 200, reply.text
    assert "client_metadata: has no effect here" in reply.headers[WARNING_HEADER]
    assert "tools.web_search: no tool of this type" in reply.headers[WARNING_HEADER]
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: ")]
    assert events[-1]["type"] == "response.completed"
    required = {
        "completed_at", "presence_penalty", "frequency_penalty", "top_logprobs", "max_tool_calls", "background",
        "service_tier", "safety_identifier", "prompt_cache_key", "truncation",
    }  # fmt: skip
    for event in (events[0], events[1], events[-1]):
        assert required <= event["response"].keys()
    assert events[0]["response"]["completed_at"] is None
    assert events[-1]["response"]["completed_at"] >= events[-1]["response"]["created_at"]
    assert events[-1]["response"]["prompt_cache_key"] == "k" * 1000


def test_a_reference_stands_for_the_item(client: httpx.Client) -> None:
    user = {"role": "user", "content": "hi"}
    first = client.post("/v1/responses", json={"model": MODEL, "input": [user]}).json()
    said = first["output"][0]
    whole = client.post("/v1/responses", json={"model": MODEL, "input": [user, said, user]}).json()
    reference = {"type": "item_reference", "id": said["id"]}
    by_name = client.post("/v1/responses", json={"model": MODEL, "input": [user, reference, user]}).json()
    assert by_name["usage"]["input_tokens"] == whole["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    assert client.get(f"/v1/responses/{by_name['id']}/input_items").json()["data"][1]["content"] == said["content"]
    client.delete(f"/v1/responses/{first['id']}")
    for stored in (whole, by_name):
        client.delete(f"/v1/responses/{stored['id']}")
    gone = client.post("/v1/responses", json={"model": MODEL, "input": [user, reference, user]}).json()["error"]
    assert (gone["param"], gone["code"]) == ("input.1.id", "item_not_found")
