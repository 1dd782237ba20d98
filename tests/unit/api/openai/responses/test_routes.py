"""OpenAI's responses: the bytes of their streams, the conversation that they make, and those in memory."""

import json
from contextlib import suppress
from typing import Literal

import pytest
from pydantic import JsonValue, ValidationError
from pydantic_core import to_json

from exo.api.http.errors import ApiError, ErrorBody
from exo.api.http.reply import Call, ReplyChoice
from exo.api.openai.response import call_id
from exo.api.openai.responses.input import InputItem, InputReference, told
from exo.api.openai.responses.request import ResponsesRequest
from exo.api.openai.responses.routes import ResponsesDialect, responses_request
from exo.api.openai.responses.store import ResponseStore, StoredResponse
from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.serving.events import ChoiceDelta, ChoiceFinished, ChoiceStarted, Completed, Started
from exo.serving.request import Conversation
from exo.worker.protocol.commands import SamplingParams
from exo.worker.protocol.events import Capabilities, Logprob, TokenLogprobs, Usage

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
LLAMA = Capabilities(
    engine="llama.cpp", engine_version="1", backend="LlamaCppCpu", context_length=16, slots=1, vocabulary=300
)
RESPONSE = (
    b'{"id":"resp_1","object":"response","created_at":1700000000,"status":"%b","completed_at":%b,"background":false,'
    b'"error":null,"incomplete_details":%b,"instructions":null,"max_output_tokens":null,"max_tool_calls":null,'
    b'"model":"a/b","output":[%b],"frequency_penalty":0.0,"parallel_tool_calls":true,"presence_penalty":0.0,'
    b'"previous_response_id":null,"prompt_cache_key":null,"reasoning":{"effort":null,"summary":null},'
    b'"safety_identifier":null,"service_tier":"default","store":true,"temperature":0.5,'
    b'"text":{"format":{"type":"text"}},"tool_choice":"auto","tools":[],"top_logprobs":0,"top_p":1.0,'
    b'"truncation":"disabled","usage":%b,"metadata":{}}'
)
NOW = b"1700000000"
USED = (
    b'{"input_tokens":3,"input_tokens_details":{"cached_tokens":1,"cache_write_tokens":0},"output_tokens":2,'
    b'"output_tokens_details":{"reasoning_tokens":0},"total_tokens":5}'
)
LOGPROBS = {"include": ["message.output_text.logprobs"]}
HI = b'{"token":"hi","logprob":-0.5,"bytes":[104,105],"top_logprobs":[]}'


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1700000000.5)


def request(**fields: object) -> ResponsesRequest:
    return ResponsesRequest.model_validate_json(json.dumps({"model": "m", "input": "hi", **fields}))


def given(body: ResponsesRequest) -> list[InputItem]:
    return [item for item in body.input if not isinstance(item, InputReference)]


def stream(store: ResponseStore | None = None, /, **fields: object) -> ResponsesDialect:
    body = request(**fields)
    items = given(body)
    dialect = ResponsesDialect("resp_1", body, items, told(items), store or ResponseStore())
    dialect.write(Started("a/b", LLAMA, sampling=SamplingParams(temperature=0.5, seed=0)))
    return dialect


def opened(store: ResponseStore | None = None, /, **fields: object) -> ResponsesDialect:
    dialect = stream(store, **fields)
    dialect.write(ChoiceStarted(0))
    return dialect


def event(number: int, kind: bytes, fields: bytes) -> bytes:
    return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (kind, kind, number, fields)


def said(*parts: Part, logprobs: tuple[TokenLogprobs, ...] = ()) -> ChoiceDelta:
    return ChoiceDelta(0, parts, (7,), logprobs)


def token(text: bytes, logprob: float) -> TokenLogprobs:
    return TokenLogprobs(chosen=Logprob(token=7, bytes=tuple(text), logprob=logprob), top=())


# --- streams ---


def test_text() -> None:
    dialect = stream()
    begun = RESPONSE % (b"in_progress", b"null", b"null", b"", b"null")
    assert dialect.write(ChoiceStarted(0)) == (
        event(0, b"response.created", b'"response":' + begun)
        + event(1, b"response.in_progress", b'"response":' + begun)
    )
    item = b'{"id":"msg_10","type":"message","status":"%b","role":"assistant","content":[%b]}'
    part = b'{"type":"output_text","text":"%b","annotations":[]}'
    where = b'"item_id":"msg_10","output_index":0,"content_index":0,'
    assert dialect.write(said(Content("x"))) == (
        event(2, b"response.output_item.added", b'"output_index":0,"item":' + item % (b"in_progress", b""))
        + event(3, b"response.content_part.added", where + b'"part":' + part % b"")
        + event(4, b"response.output_text.delta", where + b'"delta":"x","logprobs":[]')
    )
    delta = event(5, b"response.output_text.delta", where + b'"delta":"\\n\xc3\xa9","logprobs":[]')
    assert dialect.write(said(Content("\né"))) == delta
    whole = part % b"x\\n\xc3\xa9"
    done = item % (b"completed", whole)
    assert dialect.write(ChoiceFinished(0, (), "stop", None, USAGE)) == (
        event(6, b"response.output_text.done", where + b'"text":"x\\n\xc3\xa9","logprobs":[]')
        + event(7, b"response.content_part.done", where + b'"part":' + whole)
        + event(8, b"response.output_item.done", b'"output_index":0,"item":' + done)
    )
    response = RESPONSE % (b"completed", NOW, b"null", done, USED)
    assert dialect.write(Completed(USAGE)) == event(9, b"response.completed", b'"response":' + response)


def test_reasoning_and_then_text() -> None:
    dialect = opened()
    item = b'{"id":"rs_10","type":"reasoning","status":"%b","summary":[],"content":[%b]}'
    part = b'{"type":"reasoning_text","text":"%b"}'
    where = b'"item_id":"rs_10","output_index":0,"content_index":0,'
    assert dialect.write(said(Reasoning("hm"))) == (
        event(2, b"response.output_item.added", b'"output_index":0,"item":' + item % (b"in_progress", b""))
        + event(3, b"response.content_part.added", where + b'"part":' + part % b"")
        + event(4, b"response.reasoning_text.delta", where + b'"delta":"hm"')
    )
    assert dialect.write(said(Content("x"))).startswith(
        event(5, b"response.reasoning_text.done", where + b'"text":"hm"')
        + event(6, b"response.content_part.done", where + b'"part":' + part % b"hm")
        + event(7, b"response.output_item.done", b'"output_index":0,"item":' + item % (b"completed", part % b"hm"))
        + b"event: response.output_item.added\n"
    )


def test_a_call() -> None:
    dialect = opened()
    item = (
        b'{"id":"fc_10","type":"function_call","status":"%%b","call_id":"call_%b","name":"f","arguments":"%%b"}'
        % call_id("resp_1", 0, 0).encode()
    )
    where = b'"item_id":"fc_10","output_index":0,'
    assert dialect.write(said(ToolCall(0, "f"), Arguments(0, '{"a"'))) == (
        event(2, b"response.output_item.added", b'"output_index":0,"item":' + item % (b"in_progress", b""))
        + event(3, b"response.function_call_arguments.delta", where + b'"delta":"{\\"a\\""')
    )
    done = item % (b"completed", b'{\\"a\\":1}')
    assert dialect.write(ChoiceFinished(0, (Arguments(0, ":1}"),), "tool_calls", None, USAGE)) == (
        event(4, b"response.function_call_arguments.delta", where + b'"delta":":1}"')
        + event(5, b"response.function_call_arguments.done", where + b'"arguments":"{\\"a\\":1}"')
        + event(6, b"response.output_item.done", b'"output_index":0,"item":' + done)
    )
    response = RESPONSE % (b"completed", NOW, b"null", done, USED)
    assert dialect.write(Completed(USAGE)) == event(7, b"response.completed", b'"response":' + response)


def test_what_the_length_cuts_off_is_incomplete() -> None:
    dialect = opened()
    dialect.write(said(Content("x")))
    last = dialect.write(ChoiceFinished(0, (), "length", None, USAGE))
    item = (
        b'{"id":"msg_10","type":"message","status":"incomplete","role":"assistant","content":[{"type":"output_text",'
        b'"text":"x","annotations":[]}]}'
    )
    assert last.endswith(event(7, b"response.output_item.done", b'"output_index":0,"item":' + item))
    response = RESPONSE % (b"incomplete", b"null", b'{"reason":"max_output_tokens"}', item, USED)
    assert dialect.write(Completed(USAGE)) == event(8, b"response.incomplete", b'"response":' + response)


@pytest.mark.parametrize(("cut_off", "reason"), [(True, "length"), (False, "stop")])
def test_a_call_that_is_not_whole_is_an_incomplete_item(cut_off: bool, reason: Literal["length", "stop"]) -> None:
    dialect = opened()
    dialect.write(said(ToolCall(0, "f"), Arguments(0, '{"a":"hal')))
    data = dialect.write(ChoiceFinished(0, (BrokenCall(0, cut_off),), reason, None, USAGE)).decode()
    assert "response.function_call_arguments.done" not in data
    assert '"status":"incomplete","call_id"' in data


def test_logprobs_come_with_their_tokens_even_where_the_text_is_held_back() -> None:
    dialect = opened(**LOGPROBS)
    where = b'"item_id":"msg_10","output_index":0,"content_index":0,'
    more = b'{"token":"!","logprob":-1.5,"bytes":[33],"top_logprobs":[]}'
    assert dialect.write(said(Content("hi"), logprobs=(token(b"hi", -0.5),))).endswith(
        event(4, b"response.output_text.delta", where + b'"delta":"hi","logprobs":[' + HI + b"]")
    )
    held = dialect.write(said(logprobs=(token(b"!", -1.5),)))
    assert held == event(5, b"response.output_text.delta", where + b'"delta":"","logprobs":[' + more + b"]")
    done = dialect.write(ChoiceFinished(0, (Content("!"),), "stop", None, USAGE))
    assert event(7, b"response.output_text.done", where + b'"text":"hi!","logprobs":[%b,%b]' % (HI, more)) in done
    assert opened().write(said(Content("hi"), logprobs=(token(b"hi", -0.5),))).endswith(b'"logprobs":[]}\n\n')


def test_text_that_is_held_back_makes_no_event() -> None:
    assert opened().write(said()) == b""


def test_an_error_ends_a_stream_and_nothing_is_stored() -> None:
    store = ResponseStore()
    dialect = opened(store)
    dialect.write(said(Content("x")))
    body = ErrorBody(status=503, message='it\nbroke "badly"', code="runner_died")
    fields = b'"code":"runner_died","message":"it\\nbroke \\"badly\\"","param":null'
    assert dialect.error(body) == event(5, b"error", fields)
    with pytest.raises(ApiError):
        store.get("resp_1")


@pytest.mark.parametrize(
    ("parts", "choice"),
    [
        ((Content("x"),), ReplyChoice(content="x")),
        ((), ReplyChoice()),
        ((Reasoning("hm"), Content("x")), ReplyChoice(content="x", reasoning="hm")),
        ((ToolCall(0, "f"), Arguments(0, "{}")), ReplyChoice(calls=[Call("f", "{}")], reason="tool_calls")),
    ],
)
def test_a_stream_ends_with_what_a_whole_reply_is(
    parts: tuple[Content | Reasoning | ToolCall | Arguments, ...], choice: ReplyChoice
) -> None:
    dialect = opened()
    dialect.write(ChoiceFinished(0, parts, choice.reason, None, USAGE))
    last = json.loads(dialect.write(Completed(USAGE)).partition(b"data: ")[2])["response"]
    assert json.loads(stream().whole([choice], USAGE)) == last
    assert len(last["output"]) == max(1, len({type(part) for part in parts} - {Arguments}))


def test_a_response_tells_what_it_was_asked_for() -> None:
    fields: dict[str, JsonValue] = {
        "instructions": "Be brief.",
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "tools": [{"type": "function", "name": "f"}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "store": False,
    }
    store = ResponseStore()
    response = json.loads(stream(store, **fields).whole([ReplyChoice(content="x")], USAGE))
    for name in ("instructions", "max_output_tokens", "metadata", "tool_choice", "text", "store"):
        assert response[name] == fields[name]
    assert response["reasoning"]["effort"] == "low"
    assert response["tools"][0]["name"] == "f"
    with pytest.raises(ApiError):
        store.get("resp_1")


# --- conversations ---

CALL: dict[str, JsonValue] = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
TOLD_CALL: dict[str, JsonValue] = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USER: dict[str, JsonValue] = {"role": "user", "content": "hi"}


CONVERSATIONS: list[tuple[JsonValue, list[JsonValue]]] = [
    ("hi", [USER]),
    ([USER], [USER]),
    ([{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}], [USER]),
    (
        [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
        [{"role": "user", "content": "a\nb"}],
    ),
    (
        [{"role": "developer", "content": "d"}, {"role": "system", "content": "s"}],
        [{"role": "developer", "content": "d"}, {"role": "system", "content": "s"}],
    ),
    ([CALL], [{"role": "assistant", "content": "", "tool_calls": [TOLD_CALL]}]),
    (
        [{"role": "assistant", "content": "I call"}, CALL, {**CALL, "call_id": "c2"}],
        [{"role": "assistant", "content": "I call", "tool_calls": [TOLD_CALL, {**TOLD_CALL, "id": "c2"}]}],
    ),
    (
        [CALL, {"type": "function_call_output", "call_id": "c1", "output": "7"}],
        [
            {"role": "assistant", "content": "", "tool_calls": [TOLD_CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "7"},
        ],
    ),
    (
        [
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": []}]},
        ],
        [{"role": "assistant", "content": "x", "reasoning_content": "hm"}],
    ),
    (
        [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}],
        [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}],
    ),
    ([{"type": "reasoning", "summary": []}, USER], [USER]),
]


@pytest.mark.parametrize(("items", "messages"), CONVERSATIONS)
def test_items_as_messages(items: JsonValue, messages: list[JsonValue]) -> None:
    assert told(given(request(input=items))) == messages


def test_instructions_come_first_and_only_this_time() -> None:
    body = request(instructions="Be brief.")
    conversation = responses_request(body, told(given(body))).prompts[0]
    assert isinstance(conversation, Conversation)
    assert conversation.messages == ({"role": "system", "content": "Be brief."}, USER)
    store = ResponseStore()
    stream(store, instructions="Be brief.").whole([ReplyChoice(content="x")], USAGE)
    assert store.get("resp_1").messages == (USER, {"role": "assistant", "content": "x"})


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([], "input"),
        ([{"type": "image"}], "type"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "must be a data:"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "content"),
        ([{**CALL, "name": ""}], "name"),
        ([7], "type"),
    ],
)
def test_items_that_are_refused(items: JsonValue, param: str) -> None:
    with pytest.raises(ValidationError, match=param):
        request(input=items)


# --- those in memory ---


def stored(text: str = "") -> StoredResponse:
    return StoredResponse({"text": text}, [], ())


def ids(store: ResponseStore, *candidates: str) -> list[str]:
    """Those in memory, the ones last asked for last."""
    found: list[str] = []
    for each in candidates:
        with suppress(ApiError):
            store.get(each)
            found.append(each)
    return found


def test_there_are_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exo.api.openai.responses.store.MAX_RESPONSES", 3)
    store = ResponseStore()
    for name in "abc":
        store.put(name, stored())
    store.get("a")
    store.put("d", stored())
    assert ids(store, "a", "b", "c", "d") == ["a", "c", "d"]


def test_they_have_only_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(to_json(stored("x" * 100)))
    monkeypatch.setattr("exo.api.openai.responses.store.MAX_BYTES", 3 * size)
    store = ResponseStore()
    for name in "abc":
        store.put(name, stored("x" * 100))
    assert ids(store, "a", "b", "c") == ["a", "b", "c"]
    store.put("d", stored("x" * 101))
    assert ids(store, "a", "b", "c", "d") == ["c", "d"]
    store.put("e", stored("x" * 1000))
    assert ids(store, "c", "d", "e") == []
    store.put("f", stored("x" * 100))
    assert ids(store, "f") == ["f"]


def test_room_that_a_deleted_one_had_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exo.api.openai.responses.store.MAX_BYTES", 2 * len(to_json(stored())))
    store = ResponseStore()
    store.put("a", stored())
    store.put("b", stored())
    store.delete("a")
    store.put("c", stored())
    assert ids(store, "a", "b", "c") == ["b", "c"]
    with pytest.raises(ApiError) as refused:
        store.delete("a")
    assert (refused.value.status, refused.value.code) == (404, "response_not_found")


def test_an_earlier_response_that_is_gone_is_the_requests_fault() -> None:
    with pytest.raises(ApiError) as refused:
        ResponseStore().get("resp_9", "previous_response_id")
    assert (refused.value.status, refused.value.param) == (400, "previous_response_id")
