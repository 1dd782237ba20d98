"""OpenAI's own client, strict about replies, against ``exo serve`` with real runners on tiny random models."""

import json
import os
import signal
from collections.abc import Callable, Generator, Iterable
from typing import Any, cast

import jsonschema_rs
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam, ChatCompletionToolParam
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.shared_params import ResponseFormatJSONSchema

from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape
from tests.support.tiny.tool_template import TEMPLATE
from tests.support.twins import BACKENDS, write_twins

RUNNERS = ("cuda", "mlx")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["colour", "sizes", "inner"],
    "additionalProperties": False,
    "$defs": {"inner": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}},
}
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "paint", "description": "Paints.", "parameters": SCHEMA, "strict": True},
}
HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_card(home, "tiny", write_twins(home, Shape(scale=0.5), chat_template=TEMPLATE), backends=BACKENDS)
    with ServeProgram(home) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServeProgram) -> Generator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture(scope="module")
def lenient(server: ServeProgram) -> Generator[openai.OpenAI]:
    """For what the strict client refuses though OpenAI sends it: base64, and no log-probability of a first token."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(params=RUNNERS)
def model(request: pytest.FixtureRequest) -> str:
    return f"tiny@{request.param}"


def json_format(schema: dict[str, Any]) -> ResponseFormatJSONSchema:
    return {"type": "json_schema", "json_schema": {"name": "paint", "schema": schema, "strict": True}}


def chat(client: openai.OpenAI, **fields: object) -> ChatCompletion:
    return cast(Callable[..., ChatCompletion], client.chat.completions.create)(**fields)


def chat_stream(client: openai.OpenAI, **fields: object) -> Iterable[ChatCompletionChunk]:
    create = cast(Callable[..., Iterable[ChatCompletionChunk]], client.chat.completions.create)
    return create(stream=True, **fields)


def completion(client: openai.OpenAI, **fields: object) -> Completion:
    return cast(Callable[..., Completion], client.completions.create)(**fields)


def respond(client: openai.OpenAI, **fields: object) -> Response:
    return cast(Callable[..., Response], client.responses.create)(**fields)


def respond_stream(client: openai.OpenAI, **fields: object) -> list[ResponseStreamEvent]:
    return list(cast(Callable[..., Iterable[ResponseStreamEvent]], client.responses.create)(stream=True, **fields))


def content_of(chunks: Iterable[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_a_reply_follows_its_json_schema(client: openai.OpenAI, model: str) -> None:
    for seed in range(4):
        reply = client.chat.completions.create(
            model=model, messages=HI, temperature=1, seed=seed, response_format=json_format(SCHEMA)
        )
        assert reply.choices[0].finish_reason == "stop"
        jsonschema_rs.validate(SCHEMA, json.loads(reply.choices[0].message.content or ""))


def test_twins_write_the_same_json(client: openai.OpenAI) -> None:
    def text(runner: str) -> str | None:
        reply = client.chat.completions.create(
            model=f"tiny@{runner}", messages=HI, temperature=1, seed=5, response_format=json_format(SCHEMA)
        )
        return reply.choices[0].message.content

    assert text("cuda") == text("mlx")


def test_any_json_object(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(
        model=model, messages=HI, temperature=0, max_tokens=60, response_format={"type": "json_object"}
    )
    assert (reply.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("grammar", 'root ::= "yes" | "no"', ("yes", "no")),
        ("grammar", 'start: "yes" | "no"', ("yes", "no")),
        ("structured_outputs", {"regex": "yes|no"}, ("yes", "no")),
        ("structured_outputs", {"choice": ["yes", "no"]}, ("yes", "no")),
        ("structured_outputs", {"json": {"enum": ["yes", "no"]}}, ('"yes"', '"no"')),
    ],
)
def test_the_other_ways_to_constrain_output(
    client: openai.OpenAI, model: str, field: str, value: object, accepted: tuple[str, ...]
) -> None:
    reply = client.completions.create(model=model, prompt="is it?", extra_body={field: value}, seed=1)
    assert reply.choices[0].text in accepted
    assert reply.choices[0].finish_reason == "stop"


def test_a_required_call_parses_and_follows_its_schema(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(
        model=model, messages=HI, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, seed=2
    )
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "paint"
    jsonschema_rs.validate(SCHEMA, json.loads(call.function.arguments))


def test_a_named_call_streams(client: openai.OpenAI, model: str) -> None:
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=HI,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "paint"}},
            parallel_tool_calls=False,
            seed=3,
            stream=True,
        )
    )
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].id
    assert {delta.index for delta in deltas} == {0}
    assert [delta.function.name for delta in deltas if delta.function and delta.function.name] == ["paint"]
    arguments = "".join(delta.function.arguments or "" for delta in deltas if delta.function)
    jsonschema_rs.validate(SCHEMA, json.loads(arguments))
    assert len(deltas) > 2, "arguments come as they are written"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_calls_and_their_results_go_back_into_the_conversation(client: openai.OpenAI, model: str) -> None:
    call: Any = {"id": "abcdefghi", "type": "function", "function": {"name": "paint", "arguments": '{"colour":"red"}'}}
    messages: list[ChatCompletionMessageParam] = [
        *HI,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "done"},
    ]
    reply = client.chat.completions.create(model=model, messages=messages, tools=[TOOL], max_tokens=4)
    assert reply.usage is not None
    assert reply.usage.completion_tokens > 0


def test_a_call_that_the_length_cuts_off(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(
        model=model, messages=HI, tools=[TOOL], tool_choice="required", max_tokens=30, seed=2
    )
    assert reply.choices[0].finish_reason == "length"


def test_logprobs_of_a_chat(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(
        model=model, messages=HI, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    tokens = logprobs.content or []
    assert reply.usage is not None
    assert len(tokens) == reply.usage.completion_tokens
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.token == token.top_logprobs[0].token
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    written = b"".join(bytes(token.bytes or []) for token in tokens).decode(errors="replace")
    assert written.startswith(reply.choices[0].message.content or "")


def test_logprobs_stream(client: openai.OpenAI, model: str) -> None:
    request: dict[str, object] = {"model": model, "messages": HI, "temperature": 0, "max_tokens": 6, "logprobs": True}
    whole = chat(client, **request)
    chunks = chat_stream(client, **request)
    told = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
    streamed = [token for logprobs in told for token in logprobs.content or []]
    assert whole.choices[0].logprobs is not None
    assert [each.token for each in streamed] == [each.token for each in whole.choices[0].logprobs.content or []]


def test_echo_with_logprobs(lenient: openai.OpenAI, model: str) -> None:
    request: dict[str, object] = {"model": model, "prompt": "once upon", "echo": True}
    reply = completion(lenient, **request, logprobs=2, max_tokens=3, temperature=0)
    choice = reply.choices[0]
    assert choice.text.startswith("once upon")
    assert choice.logprobs is not None
    values = choice.logprobs.token_logprobs or []
    assert values[0] is None
    assert all(value is not None and value <= 0 for value in values[1:])
    assert len(values) == len(choice.logprobs.tokens or []) == len(choice.logprobs.text_offset or [])
    assert reply.usage is not None
    assert len(values) == reply.usage.prompt_tokens + reply.usage.completion_tokens
    scored = completion(lenient, **request, logprobs=0, max_tokens=0)
    assert scored.choices[0].text == "once upon"
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs == pytest.approx(values[: len(values) - 3], abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_text_offsets_count_the_characters_that_are_shown(
    server: ServeProgram, model: str, stream: bool, echo: bool
) -> None:
    """The prompt has a control token, shown as it was written; the output's control tokens are not shown."""
    control = server.client.post("/tokenize", json={"model": model, "content": "<|im_start|>"}).json()["tokens"][0]
    prompt = "caf\u00e9 <|im_start|> \U0001f600"
    body: dict[str, object] = {"prompt": prompt, "echo": echo, "logprobs": 0, "stream": stream, "temperature": 0}
    split = {**body, "grammar": 'start: "na\u00efve \U0001f600"', "max_tokens": 30}
    hidden = {**body, "logit_bias": {control: 100}, "max_tokens": 3}
    for request, output in ((split, "na\u00efve \U0001f600"), (hidden, "")):
        reply = server.client.post("/v1/completions", json={"model": model, **request})
        lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in (lines if stream else [reply.text])]
        text = "".join(choice["text"] for choice in choices)
        assert text == (prompt if echo else "") + output
        told = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
        tokens = [each for part in told for each in part["tokens"]]
        offsets = [each for part in told for each in part["text_offset"]]
        assert len(tokens) > len(output)
        for token, begin, end in zip(tokens, offsets, [*offsets[1:], len(text)], strict=True):
            # A token with a part of a character begins where the character does; the last part takes it.
            parts = "" if token.startswith("bytes:") else token
            is_hidden = token == "<|im_start|>" and begin >= len(prompt if echo else "")
            assert text[begin:end] == ("" if is_hidden else parts) or (not parts and end - begin == 1)


@pytest.mark.parametrize("name", ["<|im_start|>", "<|im_end|>"])
def test_a_stop_string_may_be_a_control_token(
    client: openai.OpenAI, server: ServeProgram, model: str, name: str
) -> None:
    (control,) = server.client.post("/tokenize", json={"model": model, "content": name}).json()["tokens"]
    reply = chat(client, model=model, messages=HI, max_tokens=9, stop=[name], logit_bias={str(control): 100})
    assert (reply.choices[0].finish_reason, reply.choices[0].message.content) == ("stop", "")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 1


def test_echo_of_token_ids(client: openai.OpenAI, server: ServeProgram, model: str) -> None:
    tokens = server.client.post("/tokenize", json={"model": model, "content": "once upon"}).json()["tokens"]
    reply = client.completions.create(model=model, prompt=tokens, echo=True, max_tokens=2)
    assert reply.choices[0].text.startswith("once upon")


def test_embeddings(client: openai.OpenAI, lenient: openai.OpenAI, model: str) -> None:
    reply = lenient.embeddings.create(model=model, input=["a cat", "a dog"])  # the client asks for base64
    floats = client.embeddings.create(model=model, input=["a cat", "a dog"], encoding_format="float")
    assert [each.index for each in reply.data] == [0, 1]
    assert reply.data[1].embedding == pytest.approx(floats.data[1].embedding, abs=1e-6)
    assert sum(value * value for value in floats.data[0].embedding) == pytest.approx(1.0, abs=1e-3)
    assert reply.usage.prompt_tokens > 0


def test_a_response_and_one_that_goes_on_from_it(client: openai.OpenAI, model: str) -> None:
    first = client.responses.create(
        model=model, input="hi", max_output_tokens=5, instructions="Be brief.", extra_body={"ignore_eos": True}
    )
    assert first.status == "incomplete"
    assert first.incomplete_details is not None
    assert first.incomplete_details.reason == "max_output_tokens"
    assert first.usage is not None
    second = client.responses.create(model=model, input="and?", max_output_tokens=5, previous_response_id=first.id)
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens - len("Be brief.")
    assert client.responses.retrieve(first.id).output_text == first.output_text
    items = client.responses.input_items.list(first.id)
    assert cast(Any, items.data[0]).content[0].text == "hi"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=model, input="x", previous_response_id=first.id)
    assert refused.value.param == "previous_response_id"


def test_a_response_streams(client: openai.OpenAI, model: str) -> None:
    request: dict[str, object] = {"model": model, "input": "hi", "max_output_tokens": 8, "temperature": 0}
    events = respond_stream(client, **request)
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-2:] == ["response.output_item.done", "response.incomplete"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete"
    whole = respond(client, **request)
    assert events[-1].response.output_text == text == whole.output_text


def test_a_response_that_calls(client: openai.OpenAI, model: str) -> None:
    tool: Any = {"type": "function", "name": "paint", "parameters": SCHEMA, "strict": True}
    request: dict[str, object] = {"model": model, "input": "hi", "tools": [tool], "tool_choice": "required"}
    events = respond_stream(client, **request, parallel_tool_calls=False, temperature=0)
    last = events[-1]
    assert last.type == "response.completed"
    call = last.response.output[0]
    assert call.type == "function_call"
    jsonschema_rs.validate(SCHEMA, json.loads(call.arguments))
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(event.delta for event in deltas if event.item_id == call.id) == call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    after = client.responses.create(
        model=model, input=[result], previous_response_id=last.response.id, max_output_tokens=3, tools=[tool]
    )
    assert after.usage is not None


def test_a_response_follows_its_format(client: openai.OpenAI, model: str) -> None:
    reply = client.responses.create(
        model=model,
        input="hi",
        temperature=0,
        text={"format": {"type": "json_schema", "name": "paint", "schema": SCHEMA}},
    )
    jsonschema_rs.validate(SCHEMA, json.loads(reply.output_text))


def test_tokens_and_templates(server: ServeProgram, model: str) -> None:
    def post(path: str, **body: object) -> dict[str, Any]:
        reply = server.client.post(path, json={"model": model, **body})
        assert reply.status_code == 200, reply.text
        return reply.json()

    pieces = post("/tokenize", content="once<|im_end|>", with_pieces=True)["tokens"]
    assert pieces[-1]["piece"] == "<|im_end|>"
    ids = [piece["id"] for piece in pieces]
    assert post("/tokenize", content="once<|im_end|>")["tokens"] == ids
    assert post("/detokenize", tokens=ids)["content"] == "once<|im_end|>"
    assert len(post("/tokenize", content="<|im_end|>", parse_special=False)["tokens"]) > 1
    prompt = post("/apply-template", messages=HI, tools=[TOOL])["prompt"]
    assert "paint" in prompt
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("runner", RUNNERS)
def test_json_survives_the_death_of_its_runner(server: ServeProgram, client: openai.OpenAI, runner: str) -> None:
    schema = {"type": "array", "items": {"enum": ["left", "right"]}, "minItems": 60, "maxItems": 60}
    request: dict[str, object] = {
        "model": f"tiny@{runner}",
        "messages": HI,
        "seed": 7,
        "response_format": json_format(schema),
    }
    whole = chat(client, **request)
    (process,) = [each for each in server.runners() if any(f"runner_{runner}" in part for part in each.cmdline())]
    chunks: list[ChatCompletionChunk] = []
    for chunk in chat_stream(client, **request):
        chunks.append(chunk)
        if len(chunks) == 20:
            os.kill(process.pid, signal.SIGKILL)
    assert not process.is_running() or process.status() == "zombie"
    text = content_of(chunks)
    jsonschema_rs.validate(schema, json.loads(text))
    assert text == whole.choices[0].message.content


def refusal(server: ServeProgram, **body: object) -> dict[str, Any]:
    reply = server.client.post("/v1/chat/completions", json={"model": "tiny", "messages": HI, **body})
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def test_what_cannot_be_done_is_refused_by_name(server: ServeProgram) -> None:
    bad = refusal(server, response_format=json_format({"type": "strange"}))
    assert bad["param"] == "response_format.json_schema.schema"
    assert "strange" in bad["message"]
    assert refusal(server, grammar="start: (")["param"] == "grammar"
    assert refusal(server, structured_outputs={"regex": "("})["param"] == "structured_outputs.regex"
    assert refusal(server, tool_choice="required")["param"] == "tool_choice"
    assert refusal(server, chat_template_kwargs={"messages": 1})["param"] == "chat_template_kwargs.messages"
    both = refusal(server, grammar='start: "a"', response_format={"type": "json_object"})
    assert both["param"] == "grammar"
