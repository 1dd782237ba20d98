"""The bytes of a stream, as they go over the wire."""

import json

import pytest

from exo.api import sse
from exo.api.errors import ErrorBody
from exo.api.openai_replies import ChatDialect, CompletionDialect
from exo.worker.messages import Usage

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
CHAT_HEAD = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"a/b",'
    b'"system_fingerprint":"llama.cpp-1"'
)
TEXT_HEAD = CHAT_HEAD.replace(b"chatcmpl-1", b"cmpl-1").replace(b"chat.completion.chunk", b"text_completion")


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1700000000.5)


def chat(*, include_usage: bool = False) -> ChatDialect:
    dialect = ChatDialect("chatcmpl-1", include_usage=include_usage)
    dialect.serving("a/b", "llama.cpp-1")
    return dialect


def completion(*, include_usage: bool = False) -> CompletionDialect:
    dialect = CompletionDialect("cmpl-1", include_usage=include_usage)
    dialect.serving("a/b", "llama.cpp-1")
    return dialect


def test_a_chat_stream() -> None:
    dialect = chat()
    assert dialect.opening(0) == (
        CHAT_HEAD + b',"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    )
    assert dialect.text(1, 'é"\n') == (
        CHAT_HEAD + ',"choices":[{"index":1,"delta":{"content":"é\\"\\n"},"finish_reason":null}]}\n\n'.encode()
    )
    assert dialect.finish(0, "length") == (
        CHAT_HEAD + b',"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n'
    )
    assert dialect.end(USAGE) == b"data: [DONE]\n\n"


def test_a_chat_stream_with_usage_says_null_in_every_chunk_but_the_last() -> None:
    dialect = chat(include_usage=True)
    assert dialect.text(0, "x") == (
        CHAT_HEAD + b',"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}],"usage":null}\n\n'
    )
    assert dialect.end(USAGE) == (
        CHAT_HEAD + b',"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,'
        b'"prompt_tokens_details":{"cached_tokens":1}}}\n\ndata: [DONE]\n\n'
    )


def test_a_completion_stream() -> None:
    dialect = completion()
    assert dialect.opening(0) == b""
    assert dialect.text(2, "x") == TEXT_HEAD + b',"choices":[{"index":2,"text":"x","finish_reason":null}]}\n\n'
    assert dialect.finish(2, "stop") == TEXT_HEAD + b',"choices":[{"index":2,"text":"","finish_reason":"stop"}]}\n\n'
    assert dialect.end(USAGE) == b"data: [DONE]\n\n"


def test_a_completion_stream_with_usage() -> None:
    dialect = completion(include_usage=True)
    assert dialect.text(0, "x").endswith(b'"finish_reason":null}],"usage":null}\n\n')
    assert b',"choices":[],"usage":{"prompt_tokens":3,' in dialect.end(USAGE)


def test_an_error_ends_a_stream_without_done() -> None:
    body = ErrorBody(status=500, message='it\nbroke "badly"', code="engine_error")
    assert chat().error(body) == (
        b'data: {"error":{"message":"it\\nbroke \\"badly\\"","type":"server_error","param":null,'
        b'"code":"engine_error"}}\n\n'
    )


@pytest.mark.parametrize("text", ["\n\ndata: [DONE]\n\n", "\r", "\u2028", "\x00", "</script>", "\U0001f600"])
def test_whatever_a_model_writes_stays_inside_its_event(text: str) -> None:
    data = chat().text(0, text)
    assert data.startswith(b"data: ")
    assert data.endswith(b"}\n\n")
    assert b"\n" not in data[:-2]
    assert b"\r" not in data
    assert json.loads(data[6:])["choices"][0]["delta"] == {"content": text}


def test_a_comment_stays_on_its_line() -> None:
    assert sse.comment("loading 12/18") == b": loading 12/18\n\n"
    assert sse.comment("a\ndata: b\r\n") == b": a data: b\n\n"
