"""Whether and how much a model is to reason: what each dialect's switch does with each kind of chat template."""

from collections.abc import Generator, Mapping
from datetime import datetime

import httpx
import pytest
from pydantic import JsonValue

from exo.chat.output.registry import output_format
from exo.chat.template.reasoning import effort_variables, empty_reasoning
from tests.chat.test_conversation import rendered
from tests.conftest import fake_card
from tests.support.api_server import serve
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
        (
            "channels",
            "none",
            "<|start|>assistant<|channel|>analysis<|message|><|end|><|start|>assistant",
            "",
        ),
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


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": CONTINUED[:1], "reasoning_effort": "none"}),
        ("/v1/responses", {"input": "hi", "reasoning": {"effort": "none"}}),
        ("/v1/messages", {"messages": CONTINUED[:1], "max_tokens": 4, "thinking": {"type": "disabled"}}),
        ("/api/chat", {"messages": CONTINUED[:1], "think": False, "stream": False}),
        ("/api/generate", {"prompt": "hi", "think": False, "stream": False}),
        ("/v1/chat/completions", {"messages": CONTINUED[:1], "reasoning_effort": "high"}),
        ("/v1/responses", {"input": "hi", "reasoning": {"effort": "high"}}),
        ("/v1/messages", {"messages": CONTINUED[:1], "max_tokens": 4, "output_config": {"effort": "high"}}),
        ("/api/chat", {"messages": CONTINUED[:1], "think": True, "stream": False}),
        ("/api/chat", {"messages": CONTINUED[:1], "think": "low", "stream": False}),
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
