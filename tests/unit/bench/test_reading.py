"""What is made of a reply, byte by byte as it may come."""

import json

import pytest

from exo.bench.client import Exchange
from exo.bench.reading import Outcome, read

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = '{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":%d,"prompt_tokens_details":{"cached_tokens":3}}}'


def chunked(*events: str, end: bool = True) -> bytes:
    bodies = [f"data: {event}\n\n".encode() for event in events]
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies) + (b"0\r\n\r\n" if end else b"")


def text(said: str, **fields: object) -> str:
    return json.dumps({"choices": [{"index": 0, "text": said, **fields}]})


def outcome(reply: bytes, size: int = 1 << 20) -> Outcome:
    """Of a reply that came in reads of ``size`` bytes, one a second."""
    pieces = [(float(at), reply[at : at + size]) for at in range(0, len(reply), size)]
    return read(Exchange(b"", pieces=pieces, ended=float(len(reply))))


def kind(of: Outcome) -> str | None:
    return of.fault.kind if of.fault else None


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_tokens_and_usage_however_the_bytes_are_cut(size: int) -> None:
    found = outcome(chunked(text("a"), text("é\n\n"), text(""), USAGE % 2, "[DONE]"), size)
    assert found.fault is None
    assert found.whole
    assert len(found.times) == 2
    assert (found.prompt_tokens, found.cached_tokens, found.completion_tokens) == (7, 3, 2)


def test_a_chunks_moment_is_that_of_its_last_byte() -> None:
    reply = chunked(text("a"), text("b"), "[DONE]")
    first_line_end = reply.index(b"\n\n") + 1
    assert outcome(reply, 1).times[0] == first_line_end - 1


def test_a_chat_begins_with_its_first_words_and_not_with_its_role() -> None:
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "yes"}, {}]
    events = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
    found = outcome(chunked(*events, USAGE % 2, "[DONE]"))
    assert (len(found.times), kind(found)) == (2, None)


def test_ids_are_counted_one_by_one() -> None:
    events = (text("ab", token_ids=[5, 6]), text("", token_ids=[7]))
    assert outcome(chunked(*events, USAGE % 3, "[DONE]")).ids == 3
    wrong = outcome(chunked(*events, USAGE % 4, "[DONE]"))
    assert kind(wrong) == "token_count"
    assert not wrong.whole


def test_more_chunks_than_tokens_is_a_fault() -> None:
    assert kind(outcome(chunked(text("a"), text("b"), USAGE % 1, "[DONE]"))) == "token_count"


def test_without_usage_the_chunks_are_counted() -> None:
    found = outcome(chunked(text("a"), text("b"), "[DONE]"))
    assert (found.completion_tokens, found.counted_by, found.whole) == (2, "chunks", True)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (b"", "connection"),
        (b"nonsense\r\n\r\n", "unreadable"),
        (b'HTTP/1.1 429 Too Many\r\ncontent-length: 33\r\n\r\n{"error":{"message":"come later"}}'[:-1], "http_429"),
        (chunked(text("a"), end=False), "incomplete"),
        (chunked(text("a"), "{"), "unreadable"),
        (chunked("[DONE]"), "no_text"),
        (chunked(text("a"), '{"error":{"message":"the runner died"}}'), "stream_error"),
    ],
)
def test_what_is_wrong_is_named(reply: bytes, expected: str) -> None:
    assert kind(outcome(reply)) == expected


def test_the_servers_own_words_are_kept() -> None:
    body = b'{"error":{"message":"come later","code":"queue_full"}}'
    refused = outcome(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    assert refused.fault is not None
    assert refused.fault.message == "come later"
    plain = outcome(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 7\r\n\r\ngo away")
    assert plain.fault is not None
    assert plain.fault.message == "go away"


def test_lines_may_end_as_on_windows_and_the_body_with_the_connection() -> None:
    lines = f"data: {text('a')}\r\n\r\n: ping\r\n\r\ndata: {USAGE % 1}\r\n\r\ndata: [DONE]\r\n\r\n"
    found = outcome(b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + lines.encode())
    assert (kind(found), found.completion_tokens) == (None, 1)
