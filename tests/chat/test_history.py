"""Conversations that chat templates with restrictions would refuse, or of which they would leave out something.

The templates are those of ``tests.support.templates``. EXO_CHAT_TEMPLATES may name a folder of ``*.jinja`` files to try
too.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import pytest
from pydantic import JsonValue

from exo.api.anthropic.request import MessagesRequest
from exo.api.anthropic.response import MessagesDialect
from exo.api.http.reply import Call, ReplyChoice
from exo.api.http.response import Dialect
from exo.api.ollama.request import OllamaChatRequest
from exo.api.ollama.response import OllamaDialect
from exo.api.openai.chat_request import ChatCompletionRequest
from exo.api.openai.response import ChatDialect
from exo.api.openai.responses.input import InputReference, told
from exo.api.openai.responses.request import ResponsesRequest
from exo.api.openai.responses.routes import ResponsesDialect
from exo.api.openai.responses.store import ResponseStore
from exo.chat.template.fitting import outline
from exo.chat.template.messages import template_messages
from exo.chat.template.renderer import ConversationRefusedError, TemplateWorker, ToolsUnsupportedError, chat_prompt
from exo.serving.events import Started
from exo.worker.protocol.events import Capabilities, Usage
from tests.support.rendering import joined, model, worker
from tests.support.templates import FAMILIES, known_templates

Message = Mapping[str, JsonValue]

TEMPLATES = tuple(known_templates())
LOOK: dict[str, JsonValue] = {
    "name": "look",
    "description": "Looks.",
    "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "What."}}},
}
FUNCTION: dict[str, JsonValue] = {"type": "function", "function": LOOK}
USAGE = Usage(prompt_tokens=3, completion_tokens=2)


WORD = re.compile(r"(?:rules|asked|said|arg|result)\d")


def capabilities(template: str) -> Capabilities:
    return model(template).model_copy(update={"context_length": 100_000})


async def rendered(template: str, *messages: Message, tools: Sequence[Message] = ()) -> str:
    async with worker() as templates:
        return joined(await chat_prompt(templates, capabilities(template), messages, tools=tools))


async def check(templates: TemplateWorker, template: str, messages: Sequence[Message]) -> None:
    """The template takes the messages, with tools and without, and leaves out no word of them but reasoning."""
    said = json.dumps([{key: value for key, value in each.items() if key != "reasoning_content"} for each in messages])
    for tools in ([FUNCTION], []):
        try:
            prompt = joined(await chat_prompt(templates, capabilities(template), messages, tools=tools))
        except ToolsUnsupportedError:
            continue
        assert not set(WORD.findall(said)) - set(WORD.findall(prompt)), (prompt, said)


# --- each of exo's own replies, sent back in each dialect ---

WHOLE = (Call("look", '{"at": "arg1"}'), Call("look", '{"at": "arg2"}'))
REPLIES = {
    "content": ReplyChoice(content="said1"),
    "reasoning": ReplyChoice(content="said1", reasoning="thought"),
    "reasoning cut off": ReplyChoice(reasoning="thought", reason="length"),
    "nothing": ReplyChoice(),
    "call": ReplyChoice(calls=[WHOLE[0]], reason="tool_calls"),
    "calls": ReplyChoice(calls=[*WHOLE], reason="tool_calls"),
    "all": ReplyChoice(content="said1", reasoning="thought", calls=[*WHOLE], reason="tool_calls"),
    "call cut off": ReplyChoice(
        content="said1", calls=[WHOLE[0], Call("look", '{"at": "arg2', whole=False)], reason="length"
    ),
    "call cut off at once": ReplyChoice(calls=[Call("look", "", whole=False)], reason="length"),
}
RESULTS = ("result1", "result2")
START = ({"role": "system", "content": "rules1"}, {"role": "user", "content": "asked1"})
END = ({"role": "user", "content": "asked2"},)


def whole(dialect: Dialect, choice: ReplyChoice) -> dict[str, Any]:
    return json.loads(dialect.whole([choice], USAGE))


def openai_chat(choice: ReplyChoice) -> Sequence[Message]:
    reply = whole(ChatDialect("chatcmpl-1"), choice)["choices"][0]["message"]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": result}
        for call, result in zip(reply.get("tool_calls", ()), RESULTS, strict=False)
    ]
    body = {"model": "m", "messages": [*START, reply, *results, *END]}
    return ChatCompletionRequest.model_validate_json(json.dumps(body)).conversation().messages


def responses(choice: ReplyChoice) -> Sequence[Message]:
    asked = ResponsesRequest.model_validate_json('{"model": "m", "input": "x"}')
    output = whole(ResponsesDialect("resp_1", asked, [], [], ResponseStore()), choice)["output"]
    calls = [item for item in output if item["type"] == "function_call"]
    results = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": result}
        for call, result in zip(calls, RESULTS, strict=False)
    ]
    body = {"model": "m", "input": [*START, *output, *results, *END]}
    items = ResponsesRequest.model_validate_json(json.dumps(body)).input
    return told([item for item in items if not isinstance(item, InputReference)])


def anthropic(choice: ReplyChoice) -> Sequence[Message]:
    content = whole(MessagesDialect("msg_1", max_tokens=9), choice)["content"]
    calls = [block for block in content if block["type"] == "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": call["id"], "content": result}
        for call, result in zip(calls, RESULTS, strict=False)
    ]
    text = [{"type": "text", "text": END[0]["content"]}]
    messages = [START[1], {"role": "assistant", "content": content}, {"role": "user", "content": [*results, *text]}]
    body = {"model": "m", "max_tokens": 9, "system": START[0]["content"], "messages": [*messages, *END[1:]]}
    return MessagesRequest.model_validate_json(json.dumps(body)).conversation().messages


def ollama(choice: ReplyChoice) -> Sequence[Message]:
    dialect = OllamaDialect("1", chat=True)
    dialect.write(Started("m", model(None)))
    reply = whole(dialect, choice)["message"]
    calls = reply.get("tool_calls", ())
    results = [
        {"role": "tool", "tool_name": "look", "content": result} for _, result in zip(calls, RESULTS, strict=False)
    ]
    body = {"model": "m", "messages": [*START, reply, *results, *END]}
    return OllamaChatRequest.model_validate_json(json.dumps(body)).conversation().messages


DIALECTS: tuple[Callable[[ReplyChoice], Sequence[Message]], ...] = (openai_chat, responses, anthropic, ollama)


@pytest.mark.parametrize(("name", "template"), TEMPLATES, ids=[name for name, _ in TEMPLATES])
async def test_each_reply_comes_back_in_its_dialect_and_is_taken(name: str, template: str) -> None:
    async with worker() as templates:
        for dialect, reply in product(DIALECTS, REPLIES.values()):
            messages = dialect(reply)
            await check(templates, template, messages[: -len(END)])
            await check(templates, template, messages)


# --- what else clients send ---


def say(role: str, content: str | None, **fields: JsonValue) -> dict[str, JsonValue]:
    return {"role": role, "content": content, **fields}


def call(number: int, arguments: JsonValue | None = None, identity: str | None = None) -> dict[str, JsonValue]:
    made = f'{{"at": "arg{number}"}}' if arguments is None else arguments
    return {"id": identity or f"call_{number}", "type": "function", "function": {"name": "look", "arguments": made}}


def calls(*made: dict[str, JsonValue], content: str | None = None, **fields: JsonValue) -> dict[str, JsonValue]:
    return say("assistant", content, tool_calls=[*made], **fields)


def result(number: int, identity: str | None = None) -> dict[str, JsonValue]:
    return say("tool", f"result{number}", tool_call_id=identity or f"call_{number}")


RULES, ASKED, SAID, ASKED2 = (
    say("system", "rules1"),
    say("user", "asked1"),
    say("assistant", "said1"),
    say("user", "asked2"),
)
CONVERSATIONS: dict[str, Sequence[Message]] = {
    **{
        f"arguments {text!r}": [ASKED, calls(call(1, text)), result(1)]
        for text in (
            "",
            "null",
            "{}",
            '{"at": "arg1',
            '{"at": "arg1", "b',
            '["arg1"]',
            "arg1",
            '"arg1"',
            '{"at": "arg1"} {',
        )
    },
    "arguments that are an object": [ASKED, calls(call(1, {"at": "arg1"})), result(1)],
    "a list for arguments": [ASKED, calls(call(1, ["arg1"])), result(1)],
    "two systems": [RULES, say("system", "rules2"), ASKED],
    "a developer": [say("developer", "rules1"), ASKED],
    "system and developer": [RULES, say("developer", "rules2"), ASKED],
    "a late system": [RULES, ASKED, say("system", "rules2"), SAID, ASKED2],
    "a late developer": [RULES, ASKED, SAID, say("developer", "rules2"), ASKED2],
    "a last system": [RULES, ASKED, SAID, ASKED2, say("system", "rules2")],
    "a system between call and result": [RULES, ASKED, calls(call(1)), say("system", "rules2"), result(1)],
    "only a system": [RULES],
    "no calls": [ASKED, say("assistant", "said1", tool_calls=[]), ASKED2],
    "content, reasoning and a call": [ASKED, calls(call(1), content="said1", reasoning_content="thought"), result(1)],
    "... and an answer": [
        ASKED,
        calls(call(1), content="said1", reasoning_content="thought"),
        result(1),
        say("assistant", "said2"),
        ASKED2,
    ],
    "several calls": [ASKED, calls(call(1), call(2), call(3)), result(1), result(2), result(3)],
    "results in another order": [ASKED, calls(call(1), call(2)), result(2), result(1)],
    "a long id": [ASKED, calls(call(1, identity="x" * 60)), result(1, "x" * 60)],
    "one id twice": [
        ASKED,
        calls(call(1, identity="call_0")),
        result(1, "call_0"),
        calls(call(2, identity="call_0")),
        result(2, "call_0"),
    ],
    "a result and a question": [ASKED, calls(call(1)), result(1), ASKED2],
    "results and a question": [RULES, ASKED, calls(call(1), call(2), content="said1"), result(1), result(2), ASKED2],
    "several questions": [ASKED, ASKED2, SAID, say("user", "asked3"), say("user", "asked4")],
    "several answers": [ASKED, SAID, say("assistant", "said2"), ASKED2],
    "an empty answer": [ASKED, say("assistant", ""), ASKED2],
    "only reasoning": [ASKED, say("assistant", "", reasoning_content="thought"), ASKED2],
    "an answer first": [SAID, ASKED],
    "an answer after the system": [RULES, SAID, ASKED],
    "a call first": [calls(call(1)), result(1), ASKED],
    "an answer last": [ASKED, SAID],
    "a result of no call": [ASKED, result(1), ASKED2],
    "a result first": [result(1), ASKED],
    "a call without a result": [ASKED, calls(call(1), content="said1"), ASKED2],
    "a result that is lacking": [ASKED, calls(call(1), call(2)), result(1), ASKED2],
}


@pytest.mark.parametrize(("name", "template"), TEMPLATES, ids=[name for name, _ in TEMPLATES])
async def test_a_well_formed_conversation_is_taken_whole(name: str, template: str) -> None:
    async with worker() as templates:
        for messages in CONVERSATIONS.values():
            await check(templates, template, messages)


def anything(chance: random.Random) -> list[Message]:
    """Some conversation, in which calls mostly have their results."""
    messages: list[Message] = []
    number = 0
    for _ in range(chance.randrange(1, 9)):
        number = (number + 1) % 10
        match chance.choice(
            ("system", "developer", "user", "user", "assistant", "assistant", "calls", "calls", "tool")
        ):
            case "calls":
                made = [
                    call(chance.randrange(10), identity=f"call_{len(messages)}_{at}")
                    for at in range(chance.randrange(1, 4))
                ]
                content = chance.choice((None, "", f"said{number}"))
                messages.append(calls(*made, content=content, **chance.choice(({}, {"reasoning_content": "thought"}))))
                for each in chance.sample(made, chance.choice((len(made), len(made) - 1))):
                    messages.append(result(chance.randrange(10), str(each["id"])))
            case "tool":
                messages.append(result(number))
            case role:
                word = {"user": "asked", "assistant": "said"}.get(role, "rules")
                messages.append(say(role, chance.choice(("", f"{word}{number}", f"{word}{number}"))))
    return messages


@pytest.mark.parametrize(("name", "template"), TEMPLATES, ids=[name for name, _ in TEMPLATES])
async def test_any_conversation_is_taken_whole(name: str, template: str) -> None:
    chance = random.Random(name)
    async with worker() as templates:
        for _ in range(60):
            await check(templates, template, anything(chance))


# --- how it is done ---


async def test_a_late_system_message_does_not_change_the_prompt_before_it() -> None:
    template = FAMILIES["system first, and a user"]
    before = await rendered(template, RULES, ASKED, SAID, ASKED2)
    after = await rendered(template, RULES, ASKED, SAID, ASKED2, say("system", "rules2"), say("assistant", "said2"))
    assert before == "<system>rules1<user>asked1<assistant>said1<user>asked2<assistant>"
    assert after == "<system>rules1<user>asked1<assistant>said1<user>asked2<user>rules2<assistant>said2<assistant>"


async def test_several_calls_are_told_one_after_another_where_a_message_has_one() -> None:
    text = await rendered(
        FAMILIES["one call, tools in the first user message"],
        ASKED,
        calls(call(1), call(2), content="said1"),
        result(2),
        result(1),
    )
    assert text == (
        '<user>asked1<assistant>said1{"name": "look", "arguments": {"at": "arg1"}}<tool>result1'
        '{"name": "look", "arguments": {"at": "arg2"}}<tool>result2<assistant>'
    )


async def test_a_call_and_its_result_keep_one_id() -> None:
    template = FAMILIES["ids of nine, alternating around calls"].replace("[TOOL_RESULTS]", "{{ m.tool_call_id }}=")
    text = await rendered(template, ASKED, calls(call(1), call(2)), result(1), result(2))
    first, second = re.findall(r"([0-9a-f]{9})=result", text)
    assert first != second
    assert text.index(f'arg1"}}}}{first}') < text.index(f'arg2"}}}}{second}')


async def test_a_system_message_opens_the_users_where_there_is_no_system() -> None:
    text = await rendered(FAMILIES["no system, alternating, no calls"], RULES, ASKED, SAID, ASKED2)
    assert text == "<user>rules1\n\nasked1<assistant>said1<user>asked2<assistant>"


async def test_calls_and_results_are_text_where_a_template_has_no_place_for_them() -> None:
    text = await rendered(FAMILIES["no calls"], ASKED, calls(call(1), content="said1"), result(1))
    assert text == (
        '<user>asked1<assistant>said1\n{"name": "look", "arguments": {"at": "arg1"}}<user>result1<assistant>'
    )


async def test_a_template_that_takes_a_conversation_gets_it_as_it_is() -> None:
    conversation = (RULES, say("system", "rules2"), ASKED, ASKED2, say("system", "rules3"), SAID, calls(call(1)))
    assert await rendered(FAMILIES["any role"], *conversation) == (
        "<system>rules1<system>rules2<user>asked1<user>asked2<system>rules3<assistant>said1<assistant>"
        '{"name": "look", "arguments": {"at": "arg1"}}<assistant>'
    )


async def test_the_templates_own_refusal_is_told_where_nothing_helps() -> None:
    with pytest.raises(ConversationRefusedError, match=r"^no$"):
        await rendered("{{ raise_exception('no') }}", ASKED)


def test_an_outline_does_not_grow_with_a_conversation_that_repeats_itself() -> None:
    turn = [ASKED, calls(call(1), call(2)), result(1), result(2), SAID]
    short, long = (outline(template_messages("", [RULES, *turn * times])) for times in (3, 300))
    assert short == long
    assert len(short.messages) < 20
    assert len(outline(template_messages("", [RULES, *turn * 300, calls(call(1)), result(1)])).messages) < 30
