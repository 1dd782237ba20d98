"""What OpenAI's clients send that decides no answer: it is accepted, and what has no effect is told."""

import json
from collections.abc import Generator, Mapping

import httpx
import pytest
from pydantic import JsonValue, ValidationError

from exo.api.http.errors import from_validation
from exo.api.http.middleware import WARNING_HEADER
from exo.api.openai.chat_request import ChatCompletionRequest
from exo.api.openai.common_request import IGNORED, UNSUPPORTED
from exo.serving.pictures.prompt_pictures import UNSEEN
from exo.serving.request import Conversation
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve

USER: dict[str, JsonValue] = {"role": "user", "content": "hi"}
TOOL: dict[str, JsonValue] = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
PICTURE: dict[str, JsonValue] = {"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}


def chat(*messages: JsonValue, **fields: object) -> ChatCompletionRequest:
    body = {"model": "m", "messages": messages or [USER], **fields}
    return ChatCompletionRequest.model_validate_json(json.dumps(body))


def warned(body: ChatCompletionRequest) -> list[str]:
    return list(dict.fromkeys(param for param, _ in body.notes()))


def refused(*messages: JsonValue, **fields: object) -> str:
    with pytest.raises(ValidationError) as caught:
        chat(*messages, **fields)
    return str(from_validation(caught.value))


NEUTRAL: dict[str, object] = {
    "min_tokens": 0,
    "repetition_penalty": 1,
    "skip_special_tokens": True,
    "add_generation_prompt": True,
    "xtc_probability": 0.0,
    "mirostat": 0,
    "cache_prompt": True,
    "return_progress": False,
    "timings_per_token": False,
    "n_probs": 0,
    "stop_token_ids": [],
    "best_of": 1,
    "service_tier": "auto",
    "store": False,
    "stop": "",
    "max_tokens": -1,
    "max_completion_tokens": -1,
    "top_k": -1,
    "user": "x" * 1000,
    "metadata": {"nested": {"count": 1}},
    "stream_options": {"include_usage": True, "continuous_usage_stats": False},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_asks_for_nothing_is_accepted_without_a_warning(name: str) -> None:
    body = chat(**{name: NEUTRAL[name]})
    assert warned(body) == []
    request = body.request()
    assert (request.stop, request.max_tokens, request.sampling.get("top_k", 0)) == ((), None, 0)


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_hints_are_accepted_and_their_neutral_values_need_no_warning(name: str) -> None:
    assert warned(chat(**{name: {"something": [1]}})) == [name]
    for neutral in (None, *IGNORED[name]):
        assert warned(chat(**{name: neutral})) == []


def test_no_field_is_both_refused_and_ignored_or_known() -> None:
    assert not IGNORED.keys() & UNSUPPORTED.keys()
    assert not (IGNORED.keys() | UNSUPPORTED.keys()) & ChatCompletionRequest.model_fields.keys()


@pytest.mark.parametrize(("name", "value"), [("num_ctx", 8192), ("keep_alive", "5m"), ("typo", None)])
def test_fields_that_do_not_exist_are_told(name: str, value: object) -> None:
    assert warned(chat(**{name: value})) == [name]


@pytest.mark.parametrize("stop", ["", [], None, [""]])
def test_no_stop_string_in_every_form(stop: object) -> None:
    assert chat(stop=stop).request().stop == ()


def test_of_stop_strings_the_empty_ones_are_left_out() -> None:
    assert chat(stop=["a", ""]).request().stop == ("a",)


def test_a_top_p_of_nothing_keeps_the_most_probable_token() -> None:
    assert 0 < chat(top_p=0).request().sampling["top_p"] < 1 / 300_000


def test_llama_servers_name_of_the_repetition_penalty_counts() -> None:
    assert chat(repeat_penalty=1.1).request().sampling == {"repetition_penalty": 1.1}
    assert chat(repeat_penalty=1.1, repetition_penalty=1.2).request().sampling == {"repetition_penalty": 1.2}


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"repeat_last_n": 64}, {"repetition_window": 64}),
        ({"repeat_last_n": -1}, {"repetition_window": 0}),
        ({"repeat_last_n": 0, "repeat_penalty": 1.3}, {"repetition_penalty": 1.0}),
        ({"repetition_context_size": 20}, {"repetition_window": 20}),
        ({"repetition_context_size": 0}, {"repetition_window": 0}),
    ],
)
def test_names_of_the_repetition_penaltys_window(fields: dict[str, object], sampling: dict[str, float]) -> None:
    assert warned(chat(**fields)) == []
    assert chat(**fields).request().sampling == sampling


@pytest.mark.parametrize("name", ["cache_prompt", "use_prefix_cache"])
def test_a_prompt_is_taken_from_the_cache_unless_the_request_says_no(name: str) -> None:
    assert chat(**{name: True}).request().cache_prompt
    assert not chat(**{name: False}).request().cache_prompt


SCHEMA: dict[str, JsonValue] = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, "response_format.schema"),
        ({"json_schema": SCHEMA}, "json_schema"),
        ({"guided_json": SCHEMA}, "guided_json"),
        ({"guided_json": json.dumps(SCHEMA)}, "guided_json"),
    ],
)
def test_other_servers_names_of_a_schema_bind_the_reply(fields: dict[str, object], param: str) -> None:
    constraint = chat(**fields).request().constraint
    assert constraint is not None
    assert (constraint.syntax, json.loads(constraint.source), constraint.param) == ("json_schema", SCHEMA, param)


@pytest.mark.parametrize(
    ("fields", "syntax"),
    [
        ({"guided_regex": "a+"}, "regex"),
        ({"guided_choice": ["a"]}, "lark"),
        ({"guided_grammar": 'root ::= "a"'}, "gbnf"),
    ],
)
def test_vllms_older_names_of_grammars_bind_the_reply(fields: dict[str, object], syntax: str) -> None:
    constraint = chat(**fields).request().constraint
    assert constraint is not None
    assert (constraint.syntax, constraint.param) == (syntax, next(iter(fields)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_probs": 3}, "n_probs: not supported"),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "response_format.schema: not accepted where type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: this field is required"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice.type: only functions can be called"),
    ],
)
def test_promises_about_the_answer_are_refused_by_name(fields: dict[str, object], message: str) -> None:
    assert refused(**fields).startswith(message)


# --- histories ---


def told(*messages: JsonValue) -> list[Mapping[str, JsonValue]]:
    (conversation,) = chat(*messages).request().prompts
    assert isinstance(conversation, Conversation)
    return list(conversation.messages)


def test_a_history_of_other_servers() -> None:
    called: JsonValue = {"name": "a/b:c", "arguments": {"x": 1}}
    call: JsonValue = {"id": "c", "type": "function", "index": 0, "function": called}
    assistant: JsonValue = {
        "role": "assistant",
        "content": None,
        "reasoning": "hm",
        "reasoning_details": [{"type": "reasoning.text", "text": "hm"}],
        "provider_specific_fields": {"x": 1},
        "thinking_blocks": [{"type": "thinking"}],
        "refusal": None,
        "audio": None,
        "function_call": None,
        "annotations": [],
        "tool_calls": [call],
    }
    result: JsonValue = {"role": "tool", "tool_call_id": "c", "name": "a/b:c", "content": None}
    messages = told(USER, assistant, result)
    function: JsonValue = {"name": "a/b:c", "arguments": '{"x":1}'}
    assert messages[1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    }
    assert messages[2] == {"role": "tool", "tool_call_id": "c", "name": "a/b:c", "content": ""}
    assert sorted(warned(chat(USER, assistant, result))) == [
        "messages.provider_specific_fields",
        "messages.reasoning_details",
        "messages.thinking_blocks",
    ]


@pytest.mark.parametrize("empty", [{}, {"content": None}, {"content": []}, {"content": "", "tool_calls": []}])
def test_an_assistant_that_says_nothing(empty: dict[str, JsonValue]) -> None:
    assert told(USER, {"role": "assistant", **empty}, USER)[1]["content"] == ""


def test_a_refusal_is_what_the_assistant_said() -> None:
    assert told(USER, {"role": "assistant", "content": None, "refusal": "No."})[1] == {
        "role": "assistant",
        "content": "No.",
    }
    parts: JsonValue = [{"type": "refusal", "refusal": "No."}]
    assert told(USER, {"role": "assistant", "content": parts})[1]["content"] == "No."


def test_parts_with_further_fields() -> None:
    parts: JsonValue = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "annotations": []},
        {"type": "thinking", "thinking": "hm"},
        {"type": "output_text", "text": "b"},
    ]
    body = chat({"role": "assistant", "content": parts})
    assert body.messages[0].content == "a\nb"
    assert warned(body) == ["messages.content.cache_control", "messages.content.thinking"]


def test_the_users_text_is_still_needed() -> None:
    assert refused({"role": "user"}) == "messages.0.content: this field is required"


def test_a_picture_in_an_earlier_result_does_not_end_the_session() -> None:
    """In any form. The others are needed, which only a model that sees can satisfy."""
    call: JsonValue = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "look"}}]}
    foreign: JsonValue = {"type": "image_url", "image_url": {"url": "blob:x"}}
    said: JsonValue = {"role": "assistant", "content": "x"}
    histories: list[list[JsonValue]] = [[USER], [said, USER]]
    for rest in histories:
        earlier: list[JsonValue] = [
            {"role": "tool", "tool_call_id": "c", "content": [each]} for each in (PICTURE, foreign)
        ]
        first, second = (chat(USER, call, result, *rest) for result in earlier)
        assert [each.answered for each in first.pictures.values()] == [False]
        assert first.messages[2].content in first.pictures
        assert second.messages[2].content == UNSEEN
        assert warned(second) == ["messages.content.image_url"]
    due = chat(USER, call, {"role": "tool", "tool_call_id": "c", "content": [PICTURE]}, {**said, "content": ""})
    assert [each.answered for each in due.pictures.values()] == [False]
    asked: JsonValue = {"role": "user", "content": [PICTURE]}
    assert [each.answered for each in chat(asked, said, USER).pictures.values()] == [True]
    assert refused({"role": "user", "content": [foreign]}).startswith("messages.0.content.0.image_url: must be a data:")


# --- tools ---


def test_tools_that_only_their_vendor_runs_are_left_out() -> None:
    body = chat(tools=[{"type": "web_search", "external_web_access": True}, TOOL, {"type": "image_generation"}])
    assert [tool.function.name for tool in body.functions] == ["look"]
    assert warned(body) == ["tools.web_search", "tools.image_generation"]


def test_more_tools_than_openai_takes() -> None:
    many = [{"type": "function", "function": {"name": f"f{number}"}} for number in range(1000)]
    assert len(chat(tools=many).tools) == 1000


@pytest.mark.parametrize("choice", ["any", {"type": "any"}, {"type": "required"}])
def test_other_words_for_a_demand(choice: object) -> None:
    assert chat(tools=[TOOL], tool_choice=choice).choice == "required"


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_a_choice_of_some_tools_hides_the_others(mode: str) -> None:
    other: JsonValue = {"type": "function", "function": {"name": "other"}}

    def allowed(name: str) -> dict[str, object]:
        return {"mode": mode, "tools": [{"type": "function", "function": {"name": name}}]}

    body = chat(tools=[other, TOOL], tool_choice={"type": "allowed_tools", "allowed_tools": allowed("look")})
    conversation = body.conversation()
    assert (body.choice, [tool.name for tool in conversation.tools]) == (mode, ["look"])
    wrong = refused(tools=[other], tool_choice={"type": "allowed_tools", "allowed_tools": allowed("look")})
    assert wrong.startswith("tool_choice.allowed_tools: there is no tool 'look'; given are other")


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, (None, "reasoning_effort")),
        ({"reasoning_effort": "max"}, ("xhigh", "reasoning_effort")),
        ({"reasoning": {"effort": "low"}}, ("low", "reasoning.effort")),
        ({"reasoning": {"enabled": False}}, ("none", "reasoning.enabled")),
        ({"thinking": {"type": "disabled"}}, ("none", "thinking")),
        ({"thinking": {"type": "enabled"}}, ("on", "thinking")),
        ({"thinking": {"type": "auto"}}, (None, "reasoning_effort")),
        ({"enable_thinking": False}, ("none", "enable_thinking")),
        ({"enable_thinking": True, "reasoning_effort": "high"}, ("high", "reasoning_effort")),
    ],
)
def test_other_servers_switches_of_reasoning(fields: dict[str, object], effort: tuple[str | None, str]) -> None:
    body = chat(**fields)
    (conversation,) = body.request().prompts
    assert isinstance(conversation, Conversation)
    assert (conversation.effort, conversation.effort_param) == effort
    assert warned(body) == []


def test_a_demanded_call_takes_the_place_of_a_response_format() -> None:
    body = chat(tools=[TOOL], tool_choice="required", response_format={"type": "json_object"})
    assert warned(body) == ["response_format"]
    assert refused(tools=[TOOL], tool_choice="required", guided_json=SCHEMA).startswith("tool_choice: not accepted")


# --- through HTTP ---


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    template = {"engines": {"cuda": {"chat_template": CHAT_TEMPLATE}}}
    cards = [fake_card(name).model_copy(update=template) for name in ("fake/one", "fake/two")]
    with serve(tmp_path_factory.mktemp("server"), *cards) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def test_a_model_need_not_be_named_where_one_is_loaded(client: httpx.Client) -> None:
    body = {"messages": [USER], "max_tokens": 3}
    unnamed = client.post("/v1/chat/completions", json=body)
    assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "model")
    assert unnamed.json()["error"]["message"] == "model: this field is required; loaded are none"
    client.post("/v1/chat/completions", json={**body, "model": "fake/two"}).raise_for_status()
    for path, fields in (
        ("/v1/chat/completions", body),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 3}),
        ("/v1/embeddings", {"input": "hi"}),
    ):
        assert client.post(path, json=fields).json()["model"] == "fake/two"
    assert client.post("/tokenize", json={"content": "hi"}).json() == {"tokens": [104, 105]}
    client.post("/v1/chat/completions", json={**body, "model": "fake/one"}).raise_for_status()
    both = client.post("/v1/chat/completions", json=body).json()["error"]
    assert both["message"] == "model: this field is required; loaded are fake/one, fake/two"


def test_embeddings_are_shortened_and_encoded(client: httpx.Client) -> None:
    whole = client.post("/v1/embeddings", json={"model": "fake/one", "input": "hi"}).json()["data"][0]["embedding"]
    short = client.post("/v1/embeddings", json={"model": "fake/one", "input": "hi", "dimensions": 2})
    assert len(short.json()["data"][0]["embedding"]) == 2 < len(whole)
    too_many = client.post("/v1/embeddings", json={"model": "fake/one", "input": "hi", "dimensions": 10_000})
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "dimensions")


def test_a_history_of_other_servers_is_served_with_a_warning(client: httpx.Client) -> None:
    said: JsonValue = {"role": "assistant", "content": "x", "reasoning_details": [{}], "cache_control": {}}
    reply = client.post(
        "/v1/chat/completions", json={"model": "fake/one", "messages": [USER, said, USER], "max_tokens": -1, "top_p": 0}
    )
    assert reply.status_code == 200, reply.text
    assert "messages.reasoning_details: has no effect here" in reply.headers[WARNING_HEADER]
    assert "messages.cache_control: has no effect here" in reply.headers[WARNING_HEADER]
