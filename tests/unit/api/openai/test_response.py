"""The bytes of a stream, as they go over the wire."""

import json

import pytest

from exo.api.http import sse
from exo.api.http.errors import ErrorBody
from exo.api.openai.completions import CompletionDialect
from exo.api.openai.response import ChatDialect, call_id
from exo.chat.output.events import Arguments, Content, Part, Reasoning, ToolCall
from exo.serving.events import ChoiceDelta, ChoiceFinished, ChoicePrompt, ChoiceStarted, Completed, Reason, Started
from exo.worker.protocol.events import Capabilities, Logprob, TokenLogprobs, Usage

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
CHAT_HEAD = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"a/b",'
    b'"system_fingerprint":"llama.cpp-1"'
)
TEXT_HEAD = CHAT_HEAD.replace(b"chatcmpl-1", b"cmpl-1").replace(b"chat.completion.chunk", b"text_completion")


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1700000000.5)


LLAMA = Capabilities(
    engine="llama.cpp", engine_version="1", backend="LlamaCppCpu", context_length=16, slots=1, vocabulary=300
)


def chat(*, include_usage: bool = False, logprobs: bool = False, token_ids: bool = False) -> ChatDialect:
    dialect = ChatDialect("chatcmpl-1", include_usage=include_usage, logprobs=logprobs, token_ids=token_ids)
    dialect.write(Started("a/b", LLAMA))
    return dialect


def completion(
    *, include_usage: bool = False, logprobs: bool = False, token_ids: bool = False, prompts: tuple[str, ...] = ()
) -> CompletionDialect:
    dialect = CompletionDialect("cmpl-1", include_usage=include_usage, logprobs=logprobs, token_ids=token_ids)
    dialect.write(Started("a/b", LLAMA, prompts))
    return dialect


def said(*parts: Part, choice: int = 0, logprobs: tuple[TokenLogprobs, ...] = ()) -> ChoiceDelta:
    return ChoiceDelta(choice, parts, (7,), logprobs)


def ended(reason: Reason, *parts: Part, choice: int = 0) -> ChoiceFinished:
    return ChoiceFinished(choice, parts, reason, None, USAGE)


def token(text: bytes, logprob: float | None, *others: Logprob) -> TokenLogprobs:
    return TokenLogprobs(chosen=Logprob(token=7, bytes=tuple(text), logprob=logprob), top=others)


def test_a_chat_stream() -> None:
    dialect = chat()
    assert dialect.write(ChoiceStarted(0)) == (
        CHAT_HEAD + b',"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    )
    assert dialect.write(said(Content('é"\n'), choice=1)) == (
        CHAT_HEAD + ',"choices":[{"index":1,"delta":{"content":"é\\"\\n"},"finish_reason":null}]}\n\n'.encode()
    )
    assert dialect.write(ended("length")) == (
        CHAT_HEAD + b',"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n'
    )
    assert dialect.write(Completed(USAGE)) == b"data: [DONE]\n\n"


def test_a_chat_stream_with_usage_says_null_in_every_chunk_but_the_last() -> None:
    dialect = chat(include_usage=True)
    assert dialect.write(said(Content("x"))) == (
        CHAT_HEAD + b',"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}],"usage":null}\n\n'
    )
    assert dialect.write(Completed(USAGE)) == (
        CHAT_HEAD + b',"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,'
        b'"prompt_tokens_details":{"cached_tokens":1},"completion_tokens_details":{"reasoning_tokens":0,'
        b'"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}}\n\ndata: [DONE]\n\n'
    )


def test_a_completion_stream() -> None:
    dialect = completion()
    assert dialect.write(ChoiceStarted(0)) == b""
    assert (
        dialect.write(said(Content("x"), choice=2))
        == TEXT_HEAD + b',"choices":[{"index":2,"text":"x","finish_reason":null}]}\n\n'
    )
    assert (
        dialect.write(ended("stop", choice=2))
        == TEXT_HEAD + b',"choices":[{"index":2,"text":"","finish_reason":"stop"}]}\n\n'
    )
    assert dialect.write(Completed(USAGE)) == b"data: [DONE]\n\n"


def test_a_completion_stream_with_usage() -> None:
    dialect = completion(include_usage=True)
    assert dialect.write(said(Content("x"))).endswith(b'"finish_reason":null}],"usage":null}\n\n')
    assert b',"choices":[],"usage":{"prompt_tokens":3,' in dialect.write(Completed(USAGE))


def test_text_that_is_held_back_makes_no_chunk() -> None:
    assert chat().write(said()) == b""
    assert completion().write(said()) == b""


def test_the_last_text_comes_before_the_end() -> None:
    data = chat().write(ended("stop", Content("x")))
    assert data == chat().write(said(Content("x"))) + chat().write(ended("stop"))
    assert completion().write(ended("stop", Content("x"))).count(b"data: ") == 2


def test_reasoning_in_a_chat_stream() -> None:
    assert chat().write(said(Reasoning("hm"))) == (
        CHAT_HEAD + b',"choices":[{"index":0,"delta":{"reasoning_content":"hm"},"finish_reason":null}]}\n\n'
    )


def test_a_call_in_a_chat_stream() -> None:
    dialect = chat()
    begin, more = b',"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,', b'}]},"finish_reason":null}]}\n\n'
    assert dialect.write(said(ToolCall(0, "f"), Arguments(0, '{"a"'))) == (
        (CHAT_HEAD + begin + b'"id":"%b","type":"function","function":{"name":"f","arguments":""}' + more)
        % call_id("chatcmpl-1", 0, 0).encode()
        + (CHAT_HEAD + begin + b'"function":{"arguments":"{\\"a\\""}' + more)
    )
    assert dialect.write(ended("tool_calls")) == (
        CHAT_HEAD + b',"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}\n\n'
    )


def test_logprobs_in_a_chat_stream() -> None:
    other = Logprob(token=8, bytes=(0xE2, 0x80), logprob=-2.5)
    data = chat(logprobs=True).write(said(Content("hi"), logprobs=(token(b"hi", -0.5, other),)))
    assert data == (
        CHAT_HEAD + b',"choices":[{"index":0,"delta":{"content":"hi"},"logprobs":{"content":[{"token":"hi",'
        b'"logprob":-0.5,"bytes":[104,105],"top_logprobs":[{"token":"bytes:\\\\xe2\\\\x80","logprob":-2.5,'
        b'"bytes":[226,128]}]}],"refusal":null},"finish_reason":null}]}\n\n'
    )
    # A token whose text is held back has its log-probability told all the same.
    held = chat(logprobs=True).write(said(logprobs=(token(b"h", -0.5),)))
    assert b'"delta":{"content":""},"logprobs":{"content":[{"token":"h"' in held


def test_token_ids() -> None:
    assert b'"delta":{"content":"x"},"token_ids":[7],"finish' in chat(token_ids=True).write(said(Content("x")))
    assert b'"delta":{"content":""},"token_ids":[7],"finish' in chat(token_ids=True).write(said())
    assert b'"text":"","token_ids":[7],"finish' in completion(token_ids=True).write(said())


def test_an_echo_begins_a_completion() -> None:
    assert completion(prompts=("once",)).write(ChoiceStarted(0)) == (
        TEXT_HEAD + b',"choices":[{"index":0,"text":"once","finish_reason":null}]}\n\n'
    )
    dialect = completion(prompts=("once",), logprobs=True)
    assert dialect.write(ChoiceStarted(0)) == b""
    prompt = ChoicePrompt(0, 0, (token(b"on", None), token(b"ce", -1.0)))
    assert dialect.write(prompt) == (
        TEXT_HEAD + b',"choices":[{"index":0,"text":"once","logprobs":{"tokens":["on","ce"],'
        b'"token_logprobs":[null,-1.0],"top_logprobs":[null,{}],"text_offset":[0,2]},"finish_reason":null}]}\n\n'
    )
    more = dialect.write(said(Content(" x"), logprobs=(token(b" x", -2.0),)))
    assert b'"text_offset":[4]' in more


def test_a_control_token_and_a_space_that_the_tokenizer_adds_take_no_room_in_the_text() -> None:
    dialect = CompletionDialect("cmpl-1", logprobs=True)
    model = LLAMA.model_copy(update={"special_tokens": ("<s>", "</s>"), "special_ids": (1, 2)})
    dialect.write(Started("a/b", model, ("once\u00e9",)))
    bos, end = (TokenLogprobs(chosen=Logprob(token=each, bytes=tuple(b"<s>"), logprob=-1.0)) for each in (1, 2))
    prompt = (bos, token(b" once", -1.0), token(b"\xc3", -1.0), token(b"\xa9", -1.0))
    assert b'"text_offset":[0,0,4,4]' in dialect.write(ChoicePrompt(0, 0, prompt))
    assert b'"text_offset":[5,5,5]' in dialect.write(said(logprobs=(end, end, token(b"\xc3", -1.0))))
    assert b'"text_offset":[5,6]' in dialect.write(said(logprobs=(token(b"\xa9", -1.0), token(b"x", -1.0))))


def test_an_error_ends_a_stream_without_done() -> None:
    body = ErrorBody(status=500, message='it\nbroke "badly"', code="engine_error")
    assert chat().error(body) == (
        b'data: {"error":{"message":"it\\nbroke \\"badly\\"","type":"server_error","param":null,'
        b'"code":"engine_error"}}\n\n'
    )


@pytest.mark.parametrize("text", ["\n\ndata: [DONE]\n\n", "\r", "\u2028", "\x00", "</script>", "\U0001f600"])
def test_whatever_a_model_writes_stays_inside_its_event(text: str) -> None:
    data = chat().write(said(Content(text)))
    assert data.startswith(b"data: ")
    assert data.endswith(b"}\n\n")
    assert b"\n" not in data[:-2]
    assert b"\r" not in data
    assert json.loads(data[6:])["choices"][0]["delta"] == {"content": text}


def test_a_comment_stays_on_its_line() -> None:
    assert sse.comment("loading 12/18") == b": loading 12/18\n\n"
    assert sse.comment("a\ndata: b\r\n") == b": a data: b\n\n"
