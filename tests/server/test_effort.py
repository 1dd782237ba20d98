"""Whether and how much a model is to reason: what each dialect's switch does with each kind of chat template."""

import json
from collections.abc import Generator, Mapping
from datetime import datetime
from typing import Any

import httpx
import pytest
from pydantic import JsonValue

from exo.chat.output.registry import output_format
from exo.chat.template.reasoning import effort_variables, empty_reasoning
from tests.chat.test_conversation import rendered
from tests.conftest import fake_card
from tests.support.api_server import serve
from tests.support.fake_model import expected_text
from tests.support.rendering import user

SAY = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
TEMPLATES = {
    "none": SAY,
    "switch": SAY + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}",
    "levels": SAY + "{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}{# </think> #}",
    "thinking": SAY + "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{{ '<think>' if thinking else '</think>' }}",
    "mode": SAY
    + "{% if thinking_mode == 'enabled' %}<mm:think>{% elif thinking_mode == 'disabled' %}</mm:think>{% endif %}"
    "{# ]<]minimax[>[ #}",
    "always": SAY + "<think>\n{# </think> #}",
    "opens itself": SAY + "{# </think> #}",
    "unmarked": SAY + "{% if reasoning_effort == 'low' %}(low){% endif %}",
    "channels": SAY + "{{ reasoning_effort }}{# <|channel|> <|message|> #}<|start|>assistant",
}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    cards = [fake_card(f"fake/{name.replace(' ', '-')}", chat_template=text) for name, text in TEMPLATES.items()]
    with serve(tmp_path_factory.mktemp("server"), *cards) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def applied(http: httpx.Client, name: str, **fields: JsonValue) -> tuple[str, str]:
    """The end of the prompt, and the warning."""
    body = {"model": f"fake/{name.replace(' ', '-')}", "messages": [{"role": "user", "content": "hi"}], **fields}
    reply = http.post("/apply-template", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["prompt"].removeprefix("user: hi\nassistant:"), reply.headers.get("x-exo-warning", "")


@pytest.mark.parametrize(
    ("name", "effort", "end", "warning"),
    [
        ("none", "none", "", ""),
        ("none", "high", "", "reasoning_effort: this model does not reason"),
        ("switch", "none", "<think></think>", ""),
        ("switch", "medium", "", ""),
        ("switch", "high", "", "reasoning_effort: this model's chat template knows no levels"),
        ("thinking", "none", "</think>", ""),
        ("thinking", "medium", "<think>", ""),
        ("mode", "none", "</mm:think>", ""),
        ("mode", "medium", "<mm:think>", ""),
        ("mode", "high", "<mm:think>", "reasoning_effort: this model's chat template knows no levels"),
        ("levels", "none", "<think>\n\n</think>\n\n", ""),
        ("levels", "low", "(low)", ""),
        ("levels", "minimal", "(low)", ""),
        ("levels", "xhigh", "(high)", ""),
        ("always", "none", "<think>\n\n</think>\n\n", ""),
        ("always", "medium", "<think>\n", ""),
        ("always", "low", "<think>\n", "reasoning_effort: this model's chat template knows no levels"),
        ("opens itself", "none", "<think>\n\n</think>\n\n", ""),
        ("opens itself", "medium", "", ""),
        ("channels", "none", "<|start|>assistant<|channel|>analysis<|message|><|end|><|start|>assistant", ""),
        ("channels", "high", "high<|start|>assistant", ""),
    ],
)
def test_an_effort_works_or_is_said_to_have_no_effect(
    http: httpx.Client, name: str, effort: str, end: str, warning: str
) -> None:
    prompt, warned = applied(http, name, reasoning_effort=effort)
    assert prompt == end
    assert warned.startswith(warning)
    assert bool(warned) == bool(warning)


def test_no_effort_leaves_the_prompt_as_the_template_makes_it(http: httpx.Client) -> None:
    assert applied(http, "always") == ("<think>\n", "")
    assert applied(http, "opens itself") == ("", "")
    assert applied(http, "mode") == ("", "")


def test_variables_that_the_template_does_not_read_have_no_effect_and_off_is_off(http: httpx.Client) -> None:
    off: JsonValue = {"enable_thinking": False}
    assert applied(http, "always", chat_template_kwargs=off) == ("<think>\n\n</think>\n\n", "")
    assert applied(http, "switch", chat_template_kwargs=off) == ("<think></think>", "")
    assert applied(http, "none", chat_template_kwargs=off) == ("", "")
    prompt, warned = applied(http, "none", chat_template_kwargs={"colour": "red", "enable_thinking": True})
    assert prompt == ""
    assert "chat_template_kwargs.colour: this model's chat template does not read it" in warned
    assert "chat_template_kwargs.enable_thinking" in warned


def test_variables_that_are_not_the_callers_are_refused(http: httpx.Client) -> None:
    body = {"model": "fake/none", "messages": [{"role": "user", "content": "hi"}]}
    reply = http.post("/v1/chat/completions", json={**body, "chat_template_kwargs": {"messages": []}})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "chat_template_kwargs.messages")


CONTINUED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]


def test_a_continued_reply_gets_no_reasoning_block(http: httpx.Client) -> None:
    body = {"messages": CONTINUED, "continue_final_message": True, "reasoning_effort": "none"}
    reply = http.post("/apply-template", json={"model": "fake/always", **body})
    assert reply.json()["prompt"] == "user: hi\nassistant: Well"


FOUR: JsonValue = {"num_predict": 4}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": CONTINUED[:1], "max_tokens": 4, "reasoning_effort": "none"}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 4, "reasoning": {"effort": "none"}}),
        ("/v1/messages", {"messages": CONTINUED[:1], "max_tokens": 4, "thinking": {"type": "disabled"}}),
        ("/api/chat", {"messages": CONTINUED[:1], "options": FOUR, "think": False, "stream": False}),
        ("/api/generate", {"prompt": "hi", "options": FOUR, "think": False, "stream": False}),
        ("/v1/chat/completions", {"messages": CONTINUED[:1], "max_tokens": 4, "reasoning_effort": "high"}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 4, "reasoning": {"effort": "high"}}),
        ("/v1/messages", {"messages": CONTINUED[:1], "max_tokens": 4, "output_config": {"effort": "high"}}),
        ("/api/chat", {"messages": CONTINUED[:1], "options": FOUR, "think": True, "stream": False}),
        ("/api/chat", {"messages": CONTINUED[:1], "options": FOUR, "think": "low", "stream": False}),
    ],
)
def test_every_dialects_switch_is_taken_by_every_kind_of_model(
    http: httpx.Client, path: str, fields: Mapping[str, JsonValue]
) -> None:
    for name in TEMPLATES:
        reply = http.post(path, json={"model": f"fake/{name.replace(' ', '-')}", **fields})
        assert reply.status_code == 200, reply.text


def test_the_switch_is_off_in_the_prompts_tokens(http: httpx.Client) -> None:
    body = {"model": "fake/always", "messages": CONTINUED[:1], "max_tokens": 4}
    on, off = (
        http.post("/v1/messages", json={**body, "thinking": {"type": kind}}).json()["usage"]["input_tokens"]
        for kind in ("adaptive", "disabled")
    )
    assert off - on == len("\n</think>\n\n")


ALWAYS = "user: hi\nassistant:<think>\n"
"""The prompt of the model that always reasons."""


def spent(http: httpx.Client, path: str, **fields: JsonValue) -> dict[str, Any]:
    """The reply of that model, which never ends its reasoning by itself."""
    said: JsonValue = [{"role": "user", "content": "hi"}]
    asked = {"input": "hi"} if path == "/v1/responses" else {"messages": said}
    reply = http.post(path, json={"model": "fake/always", "temperature": 0, **asked, **fields})
    assert reply.status_code == 200, reply.text
    assert "does not limit" not in reply.headers.get("x-exo-warning", "")
    return reply.json()


@pytest.mark.parametrize(
    "fields",
    [
        {"max_reasoning_tokens": 8},
        {"max_reasoning_tokens": 8, "reasoning_effort": "high"},
        {"reasoning": {"max_tokens": 8}},
        {"thinking": {"type": "enabled", "budget_tokens": 8}},
        {"reasoning_effort": "low"},
        {"reasoning": {"effort": "low"}},
    ],
)
def test_openais_fields_limit_the_reasoning(http: httpx.Client, fields: dict[str, JsonValue]) -> None:
    reply = spent(http, "/v1/chat/completions", max_tokens=40, **fields)
    message = reply["choices"][0]["message"]
    assert message["reasoning_content"] == expected_text(ALWAYS, 8).strip()
    assert len(message["content"].strip()) > 10
    assert "think" not in message["content"]
    assert reply["usage"]["completion_tokens"] == 40


def test_limited_reasoning_is_the_same_in_a_stream(http: httpx.Client) -> None:
    whole = spent(http, "/v1/chat/completions", max_tokens=40, max_reasoning_tokens=8)["choices"][0]["message"]
    body = {"messages": CONTINUED[:1], "max_tokens": 40, "temperature": 0, "max_reasoning_tokens": 8, "stream": True}
    reply = http.post("/v1/chat/completions", json={"model": "fake/always", **body})
    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    for field in ("reasoning_content", "content"):
        assert "".join(delta.get(field) or "" for delta in deltas) == whole[field]


def test_the_other_dialects_fields_limit_the_reasoning(http: httpx.Client) -> None:
    thought = expected_text(ALWAYS, 8).strip()
    ways: list[dict[str, JsonValue]] = [{"max_reasoning_tokens": 8}, {"reasoning": {"effort": "low"}}]
    for fields in ways:
        reply = spent(http, "/v1/responses", max_output_tokens=40, **fields)
        reasoning, message = reply["output"]
        assert reasoning["content"][0]["text"] == thought
        assert len(message["content"][0]["text"].strip()) > 10
        assert reply["usage"]["output_tokens_details"]["reasoning_tokens"] == 8
    ways = [{"thinking": {"type": "enabled", "budget_tokens": 8}}, {"output_config": {"effort": "low"}}]
    for fields in ways:
        reply = spent(http, "/v1/messages", max_tokens=40, **fields)
        assert [block["type"] for block in reply["content"]] == ["thinking", "text"]
        assert reply["content"][0]["thinking"] == thought
    options: JsonValue = {"num_predict": 40, "temperature": 0}
    ways = [{"max_reasoning_tokens": 8}, {"think": "low"}]
    for fields in ways:
        message = spent(http, "/api/chat", stream=False, options=options, **fields)["message"]
        assert message["thinking"] == thought
        assert len(message["content"].strip()) > 10


def test_a_number_that_is_not_less_than_the_replys_limit_leaves_room_for_an_answer(http: httpx.Client) -> None:
    """Clients send it with Anthropic's interleaved thinking, where it counts all turns of the model together."""
    for budget in (100, 9999):
        reply = spent(http, "/v1/messages", max_tokens=100, thinking={"type": "enabled", "budget_tokens": budget})
        assert [block["type"] for block in reply["content"]] == ["thinking", "text"]
        assert reply["usage"]["output_tokens_details"]["thinking_tokens"] == 80
    reply = spent(http, "/v1/chat/completions", max_tokens=100, max_reasoning_tokens=100)
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 80


@pytest.mark.parametrize("fields", [{"reasoning_effort": "xhigh"}, {"reasoning": {"enabled": True}}, {}])
def test_without_a_level_or_a_number_reasoning_has_no_limit(http: httpx.Client, fields: dict[str, JsonValue]) -> None:
    reply = spent(http, "/v1/chat/completions", max_tokens=40, **fields)
    assert reply["choices"][0]["message"]["reasoning_content"] == expected_text(ALWAYS, 40).strip()


@pytest.mark.parametrize(
    ("name", "fields", "warning"),
    [
        ("none", {"max_reasoning_tokens": 8}, "max_reasoning_tokens: this model does not reason"),
        ("none", {"reasoning_effort": "low"}, "reasoning_effort: this model does not reason"),
        ("unmarked", {"max_reasoning_tokens": 8}, "max_reasoning_tokens: does not limit the reasoning"),
        ("unmarked", {"reasoning_effort": "low"}, "reasoning_effort: does not limit the reasoning"),
    ],
)
def test_a_limit_that_cannot_hold_is_said_to_be_none(
    http: httpx.Client, name: str, fields: dict[str, JsonValue], warning: str
) -> None:
    body = {"model": f"fake/{name}", "messages": CONTINUED[:1], "max_tokens": 40, **fields}
    reply = http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200
    assert reply.headers["x-exo-warning"].startswith(warning)


@pytest.mark.parametrize(
    ("source", "prompt"), [("</think>", "a</think>\n\n"), ("<|channel|><|message|>", "a<|channel|>final<|message|>")]
)
def test_reasoning_that_the_template_has_ended_is_not_ended_again(source: str, prompt: str) -> None:
    assert empty_reasoning(output_format(source), prompt) == ""


def test_a_level_that_the_template_names_is_told_as_it_is() -> None:
    assert effort_variables("{% if effort == 'xhigh' %}", "xhigh")[0]["reasoning_effort"] == "xhigh"
    assert {"reasoning_effort": "none"} in effort_variables('{% if reasoning_effort == "none" %}', "none")


# --- what templates are given whose caller says nothing ---


async def test_todays_date_is_given_to_templates_that_read_it() -> None:
    today = datetime.now().astimezone()
    assert await rendered("{{ date_string }}", user("x")) == today.strftime("%d %b %Y")
    assert await rendered("{{ datetime }}", user("x")) == today.strftime("%b %d %Y")
    assert await rendered("{{ date_string }}", user("x"), variables={"date_string": "1 Jan 1970"}) == "1 Jan 1970"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if enable_thinking %}on{% endif %}", "on"),
        ("{% if enable_thinking is defined and enable_thinking %}on{% endif %}", ""),
        ("{% if enable_thinking | default(false) %}on{% endif %}", ""),
        ("{% if enable_thinking is not defined or enable_thinking %}on{% endif %}", "on"),
    ],
)
async def test_a_switch_without_a_default_is_on(template: str, expected: str) -> None:
    assert await rendered(template, user("x")) == expected
