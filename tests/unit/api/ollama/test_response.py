"""The bytes of Ollama's dialect, as they go over the wire."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count
from typing import Any

import pytest

from exo.api.http.errors import ErrorBody
from exo.api.http.reply import Call, ReplyChoice
from exo.api.ollama.response import OllamaDialect
from exo.api.openai.response import call_id
from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.serving.events import ChoiceDelta, ChoiceFinished, ChoiceStarted, Completed, Reason, Started
from exo.worker.protocol.events import Capabilities, Logprob, TokenLogprobs, Usage

USAGE = Usage(prompt_tokens=30, completion_tokens=5, cached_tokens=10)
MODEL = Capabilities(
    engine="llama.cpp", engine_version="1", backend="LlamaCppCpu", context_length=64, slots=1, vocabulary=300
)
HEAD = b'{"model":"a/b","created_at":"2023-11-14T22:13:20.500000Z",'
CALL = f"call_{call_id('1', 0, 0)}"


@pytest.fixture(autouse=True)
def _ticking_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second after the one before; the date stands still."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.fromtimestamp(1700000000.5, UTC)

    seconds: Iterator[int] = count(100)
    monkeypatch.setattr("exo.api.ollama.response.datetime", Clock)
    monkeypatch.setattr("time.monotonic_ns", lambda: next(seconds) * 10**9)


def dialect(*, chat: bool = True, logprobs: bool = False) -> OllamaDialect:
    made = OllamaDialect("1", chat=chat, logprobs=logprobs)
    made.write(Started("a/b", MODEL))
    return made


def said(*parts: Part, logprobs: tuple[TokenLogprobs, ...] = ()) -> ChoiceDelta:
    return ChoiceDelta(0, parts, (7,), logprobs)


def ended(reason: Reason, *parts: Part) -> ChoiceFinished:
    return ChoiceFinished(0, parts, reason, None, USAGE)


def lines(data: bytes) -> list[dict[str, Any]]:
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


OUTCOME = (
    b'"total_duration":3000000000,"load_duration":1000000000,"prompt_eval_count":30,'
    b'"prompt_eval_duration":1000000000,"eval_count":5,"eval_duration":1000000000}\n'
)


def test_a_chat_stream() -> None:
    wire = dialect()
    assert wire.write(ChoiceStarted(0, 30)) == b""
    assert wire.write(said(Content('é"\n'))) == (
        HEAD + '"message":{"role":"assistant","content":"é\\"\\n"},"done":false}\n'.encode()
    )
    assert wire.write(ended("length")) == b""
    end = HEAD + b'"message":{"role":"assistant","content":""},"done":true,"done_reason":"length",'
    assert wire.write(Completed(USAGE)) == end + OUTCOME


def test_a_completion_stream() -> None:
    wire = dialect(chat=False)
    assert wire.write(said(Content("x"))) == HEAD + b'"response":"x","done":false}\n'
    assert wire.write(said(Reasoning("hm"))) == HEAD + b'"response":"","thinking":"hm","done":false}\n'
    assert wire.write(Completed(USAGE)) == HEAD + b'"response":"","done":true,"done_reason":"stop",' + OUTCOME


def test_a_whole_reply() -> None:
    choice = ReplyChoice(
        content="x", reasoning="hm", calls=[Call("f", '{"a":1}')], reason="tool_calls", began=102 * 10**9
    )
    assert dialect().whole([choice], USAGE) == (
        HEAD + b'"message":{"role":"assistant","content":"x","thinking":"hm","tool_calls":[{"id":"%b",'
        b'"function":{"index":0,"name":"f","arguments":{"a":1}}}]},"done":true,"done_reason":"stop",'
        b'"total_duration":2000000000,"load_duration":1000000000,"prompt_eval_count":30,'
        b'"prompt_eval_duration":1000000000,"eval_count":5,"eval_duration":0}' % CALL.encode()
    )


def test_a_call_is_told_when_it_is_whole() -> None:
    wire = dialect()
    assert wire.write(said(ToolCall(0, "f"), Arguments(0, '{"a"'))) == b""
    assert wire.write(said(Arguments(0, ":1}"))) == b""
    first, second = lines(wire.write(ended("tool_calls", ToolCall(1, "g"), Arguments(1, "{}"))))
    assert first["message"]["tool_calls"] == [
        {"id": CALL, "function": {"index": 0, "name": "f", "arguments": {"a": 1}}}
    ]
    assert second["message"]["tool_calls"][0]["function"] == {"index": 1, "name": "g", "arguments": {}}
    assert lines(wire.write(Completed(USAGE)))[0]["done_reason"] == "stop"


def test_a_call_that_the_limit_broke_off_is_not_told() -> None:
    wire = dialect()
    assert wire.write(ended("length", ToolCall(0, "f"), Arguments(0, '{"a":1,"b'), BrokenCall(0, True))) == b""
    assert lines(wire.write(Completed(USAGE)))[0]["done_reason"] == "length"
    cut = Call("f", '{"a":1,"b', whole=False)
    whole = json.loads(dialect().whole([ReplyChoice(calls=[cut], reason="length")], USAGE))
    assert whole["message"] == {"role": "assistant", "content": ""}


def test_logprobs_are_told_once_each() -> None:
    token = TokenLogprobs(
        chosen=Logprob(token=7, bytes=(104,), logprob=-0.5), top=(Logprob(token=8, bytes=(105,), logprob=-2.5),)
    )
    first, second = lines(dialect(logprobs=True).write(said(Reasoning("hm"), Content("h"), logprobs=(token,))))
    told = {"token": "h", "logprob": -0.5, "bytes": [104]}
    assert first["logprobs"] == [{**told, "top_logprobs": [{"token": "i", "logprob": -2.5, "bytes": [105]}]}]
    assert "logprobs" not in second
    (held_back,) = lines(dialect(chat=False, logprobs=True).write(said(logprobs=(token,))))
    assert (held_back["response"], len(held_back["logprobs"])) == ("", 1)


def test_an_error_and_a_note() -> None:
    body = ErrorBody(status=500, message='it\nbroke "badly"', code="engine_error")
    assert dialect().error(body) == b'{"error":"it\\nbroke \\"badly\\""}\n'
    assert dialect().note("loading 3/18") == b""


@pytest.mark.parametrize("text", ["\n", "\r\n", "\u2028", "\x85", "\x00", "\U0001f600"])
def test_whatever_a_model_writes_stays_on_its_line(text: str) -> None:
    data = dialect().write(said(Content(text)))
    assert len(data.decode().splitlines()) == 1  # which is how httpx finds lines
    assert json.loads(data)["message"]["content"] == text
