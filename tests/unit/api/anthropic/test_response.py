"""The bytes of Anthropic's dialect, as they go over the wire."""

import json

import pytest

from exo.api.anthropic.response import MessagesDialect
from exo.api.http.errors import ErrorBody
from exo.api.http.reply import Call, ReplyChoice
from exo.api.openai.response import call_id
from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.serving.events import ChoiceDelta, ChoiceFinished, ChoiceStarted, Completed, Reason, Started
from exo.worker.protocol.events import Capabilities, Usage

USAGE = Usage(prompt_tokens=30, completion_tokens=5, cached_tokens=10)
MODEL = Capabilities(
    engine="llama.cpp", engine_version="1", backend="LlamaCppCpu", context_length=64, slots=1, vocabulary=300
)
CALL = f"toolu_{call_id('msg_1', 0, 0)}"


def dialect(*, max_tokens: int = 5, thinking: bool = True) -> MessagesDialect:
    made = MessagesDialect("msg_1", max_tokens=max_tokens, thinking=thinking)
    made.write(Started("a/b", MODEL))
    return made


def said(*parts: Part) -> ChoiceDelta:
    return ChoiceDelta(0, parts, (7,), ())


def ended(reason: Reason, *parts: Part, stop: str | None = None, reasoning_tokens: int = 0) -> ChoiceFinished:
    return ChoiceFinished(0, parts, reason, stop, USAGE, reasoning_tokens)


def event(kind: str, fields: str) -> bytes:
    return f'event: {kind}\ndata: {{"type":"{kind}"{fields}}}\n\n'.encode()


def test_a_stream_of_text() -> None:
    wire = dialect()
    assert wire.write(ChoiceStarted(0, 30)) == event(
        "message_start",
        ',"message":{"id":"msg_1","type":"message","role":"assistant","model":"a/b","content":[],"stop_reason":null,'
        '"stop_sequence":null,"usage":{"input_tokens":30,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":0}}',
    )
    begin = event("content_block_start", ',"index":0,"content_block":{"type":"text","text":""}')
    delta = event("content_block_delta", ',"index":0,"delta":{"type":"text_delta","text":"é\\"\\n"}')
    assert wire.write(said(Content('é"\n'))) == begin + delta
    assert wire.write(said(Content('é"\n'))) == delta
    assert wire.write(ended("stop")) == event("content_block_stop", ',"index":0') + event(
        "message_delta",
        ',"delta":{"stop_reason":"end_turn","stop_sequence":null},'
        '"usage":{"input_tokens":20,"cache_creation_input_tokens":0,"cache_read_input_tokens":10,"output_tokens":5}',
    )
    assert wire.write(Completed(USAGE)) == event("message_stop", "")


def test_a_stream_of_reasoning_text_and_calls() -> None:
    wire = dialect()
    assert wire.write(said(Reasoning("hm"))) == (
        event("content_block_start", ',"index":0,"content_block":{"type":"thinking","thinking":"","signature":""}')
        + event("content_block_delta", ',"index":0,"delta":{"type":"thinking_delta","thinking":"hm"}')
    )
    assert wire.write(said(Content("x"), ToolCall(0, "f"), Arguments(0, '{"a"'))) == (
        event("content_block_stop", ',"index":0')
        + event("content_block_start", ',"index":1,"content_block":{"type":"text","text":""}')
        + event("content_block_delta", ',"index":1,"delta":{"type":"text_delta","text":"x"}')
        + event("content_block_stop", ',"index":1')
        + event(
            "content_block_start",
            f',"index":2,"content_block":{{"type":"tool_use","id":"{CALL}","name":"f","input":{{}}}}',
        )
        + event("content_block_delta", ',"index":2,"delta":{"type":"input_json_delta","partial_json":"{\\"a\\""}')
    )
    data = wire.write(ended("tool_calls", Arguments(0, ":1}"), ToolCall(1, "g"), Arguments(1, "{}")))
    one_more_block = ["content_block_stop", "content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds(data) == ["content_block_delta", *one_more_block, "message_delta"]
    assert b'"stop_reason":"tool_use"' in data


def test_reasoning_may_be_left_out_and_is_counted_all_the_same() -> None:
    wire = dialect(thinking=False)
    assert wire.write(said(Reasoning("hm"))) == b""
    assert b'"output_tokens_details":{"thinking_tokens":3}' in wire.write(ended("stop", reasoning_tokens=3))


@pytest.mark.parametrize(
    ("end", "max_tokens", "reason", "sequence"),
    [
        (ended("stop"), 9, "end_turn", None),
        (ended("stop", stop="END"), 9, "stop_sequence", "END"),
        (ended("length"), 5, "max_tokens", None),
        (ended("length"), 9, "model_context_window_exceeded", None),
        (ended("tool_calls"), 9, "tool_use", None),
    ],
)
def test_why_a_reply_ends(end: ChoiceFinished, max_tokens: int, reason: str, sequence: str | None) -> None:
    (line,) = [line for line in dialect(max_tokens=max_tokens).write(end).decode().splitlines() if "delta" in line[6:]][
        1:
    ]
    assert json.loads(line[6:])["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    choice = ReplyChoice(reason=end.reason, stop=end.stop)
    whole = json.loads(dialect(max_tokens=max_tokens).whole([choice], USAGE))
    assert (whole["stop_reason"], whole["stop_sequence"], whole["content"]) == (reason, sequence, [])


def test_a_whole_reply() -> None:
    choice = ReplyChoice(
        content="x", reasoning="hm", calls=[Call("f", '{"a":1}')], reason="tool_calls", reasoning_tokens=2
    )
    assert dialect().whole([choice], USAGE) == (
        b'{"id":"msg_1","type":"message","role":"assistant","model":"a/b","content":['
        b'{"type":"thinking","thinking":"hm","signature":""},{"type":"text","text":"x"},'
        b'{"type":"tool_use","id":"%b","name":"f","input":{"a":1}}],"stop_reason":"tool_use","stop_sequence":null,'
        b'"usage":{"input_tokens":20,"cache_creation_input_tokens":0,"cache_read_input_tokens":10,"output_tokens":5,'
        b'"output_tokens_details":{"thinking_tokens":2}}}' % CALL.encode()
    )


@pytest.mark.parametrize("arguments", ["", '{"a":[1,2', '{"a":1,"b":"x'])
def test_a_call_that_the_limit_cut_off_is_no_call(arguments: str) -> None:
    call = Call("f", arguments, whole=False)
    whole = json.loads(dialect().whole([ReplyChoice(content="x", calls=[call], reason="length")], USAGE))
    assert (whole["content"], whole["stop_reason"]) == ([{"type": "text", "text": "x"}], "max_tokens")


def kinds(data: bytes) -> list[str]:
    return [json.loads(line[6:])["type"] for line in data.decode().splitlines() if line.startswith("data: ")]


def test_the_block_of_a_call_that_the_limit_cut_off_does_not_stop() -> None:
    wire = dialect()
    wire.write(said(ToolCall(0, "f"), Arguments(0, '{"a":"hal')))
    data = wire.write(ended("length", BrokenCall(0, True)))
    assert kinds(data + wire.write(Completed(USAGE))) == ["message_delta", "message_stop"]
    assert b'"stop_reason":"max_tokens"' in data


def test_a_stream_with_a_broken_call_ends_with_an_error() -> None:
    wire = dialect()
    wire.write(said(ToolCall(0, "f"), Arguments(0, '{"a":"hal')))
    data = wire.write(said(BrokenCall(0, False), Content("<f>")))
    assert kinds(data) == ["content_block_start", "content_block_delta"]
    assert b'"index":1' in data
    assert kinds(wire.write(ended("stop")) + wire.write(Completed(USAGE))) == ["content_block_stop", "error"]


def test_an_error_and_a_note() -> None:
    body = ErrorBody(status=503, message='it\nbroke "badly"', code="runner_died")
    assert dialect().error(body) == (
        b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error",'
        b'"message":"it\\nbroke \\"badly\\""}}\n\n'
    )
    assert dialect().note("loading 3/18") == b': loading 3/18\nevent: ping\ndata: {"type":"ping"}\n\n'


@pytest.mark.parametrize("text", ["\n\nevent: message_stop\n\n", "\r", "\u2028", "\x00", "\U0001f600"])
def test_whatever_a_model_writes_stays_inside_its_event(text: str) -> None:
    data = dialect().write(said(Content(text)))
    *_, delta = data.removesuffix(b"\n\n").split(b"\n\n")
    name, line = delta.split(b"\n")
    assert name == b"event: content_block_delta"
    assert json.loads(line[6:])["delta"]["text"] == text
    assert b"\r" not in data
