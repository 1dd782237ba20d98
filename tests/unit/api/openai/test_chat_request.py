"""OpenAI's requests: what is accepted, and how everything else is refused."""

import json

import pytest
from pydantic import ValidationError

from exo.api.http.errors import ErrorBody, error_body, from_validation
from exo.api.openai.chat_request import ChatCompletionRequest
from exo.api.openai.common_request import UNSUPPORTED, CompletionRequest, GenerationFields

CHAT: dict[str, object] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, object] = {"model": "m", "prompt": "hi"}


def chat(**fields: object) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate_json(json.dumps({**CHAT, **fields}))


def completion(**fields: object) -> CompletionRequest:
    return CompletionRequest.model_validate_json(json.dumps({**COMPLETION, **fields}))


def refusal(model: type[GenerationFields], body: str) -> ErrorBody:
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(body)
    return error_body(from_validation(caught.value))


def chat_refusal(**fields: object) -> ErrorBody:
    return refusal(ChatCompletionRequest, json.dumps({**CHAT, **fields}))


def completion_refusal(**fields: object) -> ErrorBody:
    return refusal(CompletionRequest, json.dumps({**COMPLETION, **fields}))


@pytest.mark.parametrize("name", sorted(set(ChatCompletionRequest.model_fields) - {"model", "messages"}))
def test_null_means_the_default(name: str) -> None:
    assert chat(**{name: None}) == chat()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("temperature", "0.5", 'number (got "0.5")'),
        ("temperature", True, "number (got true)"),
        ("temperature", 2.5, "less than or equal to 2 (got 2.5)"),
        ("top_p", -0.1, "greater than or equal to 0 (got -0.1)"),
        ("top_k", -2, "greater than or equal to -1 (got -2)"),
        ("top_k", 40.0, "integer (got 40.0)"),
        ("min_p", 1.5, "less than or equal to 1"),
        ("repetition_penalty", 1e-40, "greater than or equal to 0.01"),
        ("presence_penalty", 3, "less than or equal to 2"),
        ("frequency_penalty", -3, "greater than or equal to -2"),
        ("max_tokens", 1.0, "integer (got 1.0)"),
        ("max_tokens", True, "integer (got true)"),
        ("max_tokens", 0, "greater than or equal to 1"),
        ("max_tokens", -2, "greater than or equal to 1"),
        ("max_tokens", 10**30, "less than or equal to"),
        ("n", 17, "less than or equal to 16"),
        ("seed", 1 << 64, "less than"),
        ("stream", 1, "boolean (got 1)"),
        ("stream", "true", "boolean"),
        ("ignore_eos", "yes", "boolean"),
        ("stop", 5, "array (got 5)"),
        ("stop", ["a"] * 17, "at most 16"),
        ("model", "x" * 301, "at most 300 characters"),
        ("messages", [], "at least 1 item"),
        ("messages", "hi", "array"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_accepted(field: str, value: object, says: str) -> None:
    body = chat_refusal(**{field: value})
    assert (body.status, body.code, body.param) == (400, "invalid_value", field)
    assert body.message.startswith(f"{field}: ")
    assert says in body.message


MISPLACED: list[tuple[dict[str, object], str]] = [
    ({"stop": ["a", 5]}, "stop.1"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": ["hi"]}, "messages.0"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
]


@pytest.mark.parametrize(("fields", "param"), MISPLACED)
def test_the_place_inside_a_field_is_named(fields: dict[str, object], param: str) -> None:
    body = chat_refusal(**fields)
    assert (body.status, body.code, body.param) == (400, "invalid_value", param)
    assert body.message.startswith(f"{param}: ")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_must_be_finite(number: str) -> None:
    body = refusal(ChatCompletionRequest, json.dumps(CHAT)[:-1] + f', "temperature": {number}}}')
    assert (body.status, body.param) == (400, "temperature")


@pytest.mark.parametrize(
    "body", ["", "{", "nul", '{"model": "m"} x', '{"model": "\\ud800"}', '{"a": ' + "[" * 10_000 + "]" * 10_000 + "}"]
)
def test_what_is_no_json_is_refused(body: str) -> None:
    assert refusal(ChatCompletionRequest, body).code == "invalid_json"


def test_a_body_that_is_no_object_is_refused() -> None:
    body = refusal(ChatCompletionRequest, "[1]")
    assert (body.status, body.param, body.message) == (400, None, "Input should be an object (got [1])")


@pytest.mark.parametrize("name", ["response_format", "tools"])
def test_a_completion_cannot_have_chats_output(name: str) -> None:
    body = refusal(CompletionRequest, json.dumps({**COMPLETION, name: {"type": "json_object"}}))
    assert (body.status, body.code, body.param) == (400, "unsupported_parameter", name)


@pytest.mark.parametrize(("left_out", "of"), [("messages", CHAT), ("prompt", COMPLETION)])
def test_a_missing_field_is_named(left_out: str, of: dict[str, object]) -> None:
    model = ChatCompletionRequest if of is CHAT else CompletionRequest
    body = refusal(model, json.dumps({name: value for name, value in of.items() if name != left_out}))
    assert (body.status, body.code, body.param) == (400, "missing_parameter", left_out)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_cannot_be_honoured_is_refused_by_name_unless_it_asks_for_nothing(name: str) -> None:
    body = chat_refusal(**{name: {"something": [1]}})
    assert (body.status, body.code, body.param) == (400, "unsupported_parameter", name)
    assert body.message.startswith(f"{name}: not supported")
    for neutral in (None, *UNSUPPORTED[name]):
        assert chat(**{name: neutral}) == chat()


UNSUPPORTED_VALUES: list[tuple[dict[str, object], str]] = [
    ({"best_of": 2}, "best_of"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0.image_url",
    ),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
]


@pytest.mark.parametrize(("fields", "param"), UNSUPPORTED_VALUES)
def test_unsupported_values(fields: dict[str, object], param: str) -> None:
    body = chat_refusal(**fields)
    assert (body.status, body.code, body.param) == (400, "unsupported_parameter", param)


def test_text_parts_become_lines() -> None:
    parts: object = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "a\nb"


def test_a_reply_can_be_sent_back_as_a_message() -> None:
    said: object = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert chat(messages=[said]).messages[0].content == "x"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ["hi"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_the_forms_of_a_prompt(prompt: object, prompts: object) -> None:
    assert completion(prompt=prompt).prompt == prompts


@pytest.mark.parametrize("prompt", [[], [[]], {}, 5, [1, "a"], ["a", 1], [1.0], [True], [-1], [[1 << 31]]])
def test_what_is_no_prompt_is_refused(prompt: object) -> None:
    body = completion_refusal(prompt=prompt)
    assert body.code == "invalid_value"
    assert (body.param or "").startswith("prompt")
    assert "list of token ids" in body.message


def test_too_many_choices_are_refused() -> None:
    assert completion_refusal(prompt=["x"] * 1025).param == "prompt"
    assert completion_refusal(prompt=["x"] * 100, n=16).param == "n"
    assert len(completion(prompt=["x"] * 64, n=16).prompt) == 64
