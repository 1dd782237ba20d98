"""What a request is refused for, in which words, and what a replayed request has left to do."""

import pytest

from exo.worker.protocol.commands import (
    Embed,
    Rank,
    Text,
    Tokenize,
)
from exo.worker.protocol.events import Capabilities, Tokenized
from exo.worker.protocol.messages import (
    MAX_PROMPT_LOGPROBS,
    MAX_TOKENIZED,
    PART_BYTES,
    PART_TOKENS,
)
from exo.worker.runner_common.request_checks import input_refusal, length_limit, refusal, resume, tokenized, within
from tests.support.bytes_vocabulary import CONTROL, END, SIZE, BytesVocabulary
from tests.support.program import ask

N_CTX = 10


def capable(*, embeddings: bool = False, rerank: bool = False, n_ctx: int = N_CTX) -> Capabilities:
    return Capabilities(
        engine="x",
        engine_version="1",
        backend="x",
        context_length=n_ctx,
        slots=1,
        vocabulary=SIZE,
        embeddings=embeddings,
        rerank=rerank,
    )


@pytest.mark.parametrize(
    ("change", "prompt", "param", "reason"),
    [
        ({}, [], "prompt", "it is empty"),
        ({}, [1, SIZE], "prompt", f"token id {SIZE} is not in 0 to {SIZE - 1}"),
        ({}, [-1], "prompt", "token id -1 is not in 0"),
        ({"delivered": (1, SIZE)}, [1], "delivered", f"token id {SIZE} is"),
        ({"stop": ("x", "")}, [1], "stop", "a stop string is empty"),
        ({"prompt_logprobs": 1}, [1] * (MAX_PROMPT_LOGPROBS // 2 + 1), "prompt_logprobs", "with 1, a prompt may have"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_its_field(
    change: dict[str, object], prompt: list[int], param: str, reason: str
) -> None:
    failed = refusal(ask("a").model_copy(update=change), prompt, capable())
    assert failed is not None
    assert (failed.id, failed.code, failed.param) == ("a", "invalid_request", param)
    assert failed.message.startswith(f"{param}: ")
    assert reason in failed.message


def test_a_bias_of_a_token_that_is_not_there_is_refused() -> None:
    failed = refusal(ask("a", logit_bias={SIZE: 1.0}), [1], capable())
    assert failed is not None
    assert (failed.code, failed.param) == ("invalid_request", "logit_bias")


def test_a_prompt_must_leave_room_for_one_token() -> None:
    assert refusal(ask("a"), [0] * (N_CTX - 1), capable()) is None
    failed = refusal(ask("a"), [0] * N_CTX, capable())
    assert failed is not None
    assert (failed.code, failed.param) == ("context_length_exceeded", "prompt")
    assert "the prompt has 10 tokens, but the context holds 10" in failed.message
    assert "at most 9" in failed.message


def test_the_last_token_of_the_vocabulary_and_the_longest_scored_prompt_are_served() -> None:
    long = [SIZE - 1] * (MAX_PROMPT_LOGPROBS // 2)
    request = ask("a", logit_bias={SIZE - 1: 1.0}).model_copy(update={"prompt_logprobs": 1})
    assert refusal(request, long, capable(n_ctx=len(long) + 1)) is None


EMBED = Embed(id="a", prompt=(Text(text="x"),))
RANK = Rank(id="a", query="q", document="d")


@pytest.mark.parametrize(
    ("asked", "tokens", "param", "code"),
    [
        (EMBED, [1] * 5, "prompt", "context_length_exceeded"),
        (EMBED, [SIZE], "prompt", "invalid_request"),
        (EMBED, [], "prompt", "invalid_request"),
        (EMBED.model_copy(update={"prompt": (Text(text=""),)}), [CONTROL], "prompt", "invalid_request"),
        (RANK, [1] * 5, "document", "context_length_exceeded"),
        (RANK.model_copy(update={"query": ""}), [CONTROL], "query", "invalid_request"),
        (RANK.model_copy(update={"document": ""}), [CONTROL], "document", "invalid_request"),
    ],
)
def test_a_text_that_cannot_be_embedded_or_ranked_is_refused(
    asked: Embed | Rank, tokens: list[int], param: str, code: str
) -> None:
    failed = input_refusal(asked, tokens, capable(embeddings=True, rerank=True), longest=4)
    assert failed is not None
    assert (failed.id, failed.code, failed.param) == ("a", code, param)


@pytest.mark.parametrize("asked", [EMBED, RANK])
def test_a_model_that_does_something_else_refuses_vectors_and_scores(asked: Embed | Rank) -> None:
    assert input_refusal(asked, [1] * 4, capable(embeddings=True, rerank=True), longest=4) is None
    other = capable(embeddings=isinstance(asked, Rank), rerank=isinstance(asked, Embed))
    failed = input_refusal(asked, [1] * 4, other, longest=4)
    assert failed is not None
    assert (failed.code, failed.param) == ("invalid_request", "model")


@pytest.mark.parametrize(
    ("tokens", "closing", "kept"),
    [
        ([1, 2, 3, 4], [], [1, 2, 3]),
        ([1, 2, 3, 9], [9], [1, 2, 9]),
        ([1, 2, 3, 4], [9], [1, 2, 3]),
        ([1, 2, 7, 8, 9, 9], [7, 8, 9, 9], [8, 9, 9]),
        ([1, 2, 9], [9], [1, 2, 9]),
    ],
)
def test_a_text_is_cut_before_the_tokens_that_close_it(tokens: list[int], closing: list[int], kept: list[int]) -> None:
    assert within(EMBED.model_copy(update={"truncate": True}), tokens, 3, closing) == kept
    assert within(EMBED, tokens, 3, closing) == tokens


@pytest.mark.parametrize("piece", [1, 100])
def test_the_parts_of_tokenized_text_are_bounded_and_together_the_whole(piece: int) -> None:
    class Wide(BytesVocabulary):
        def piece_of(self, token: int) -> bytes:
            return bytes([token]) * piece

    tokens = [number % 256 for number in range(2 * PART_TOKENS + 1)]
    parts = list(tokenized(Tokenize(id="a", prompt=()), tokens, SIZE, Wide()))
    assert len(parts) >= 3
    told: list[int] = []
    for number, part in enumerate(parts, 1):
        assert isinstance(part, Tokenized)
        assert part.more == (number < len(parts))
        assert len(part.tokens) <= PART_TOKENS
        assert sum(map(len, part.bytes)) <= PART_BYTES + piece
        assert [bytes(each) for each in part.bytes] == [bytes([token]) * piece for token in part.tokens]
        told += part.tokens
    assert told == tokens


def test_tokens_that_cannot_be_told_are_refused() -> None:
    request = Tokenize(id="a", prompt=())
    for tokens, reason in (([SIZE], "token id"), ([0] * (MAX_TOKENIZED + 1), f"at most {MAX_TOKENIZED}")):
        [failed] = tokenized(request, tokens, SIZE, BytesVocabulary())
        assert not isinstance(failed, Tokenized)
        assert (failed.code, failed.param) == ("invalid_request", "prompt")
        assert reason in failed.message
    assert list(tokenized(request, [], SIZE, BytesVocabulary())) == [Tokenized(id="a", tokens=(), bytes=())]


@pytest.mark.parametrize(("max_tokens", "limit"), [(None, N_CTX), (0, 4), (5, 9), (100, N_CTX)])
def test_a_sequence_ends_with_its_tokens_or_with_the_context(max_tokens: int | None, limit: int) -> None:
    assert length_limit(ask("a", max_tokens=max_tokens), 4, N_CTX) == limit


@pytest.mark.parametrize(
    ("delivered", "stop", "ended"),
    [
        ([], "", None),
        ([*b"abc"], "", None),
        ([*b"abcd"], "", "length"),
        ([*b"abc"], "bc", "stop"),
        ([*b"abcd"], "cd", "stop"),
        ([*b"abc", END], "", "stop"),
        ([*b"ab", CONTROL], "b<", None),
    ],
)
def test_a_replay_has_ended_where_the_undisturbed_sequence_had(
    delivered: list[int], stop: str, ended: str | None
) -> None:
    request = ask("a", stop=(stop,) if stop else ()).model_copy(update={"delivered": tuple(delivered)})
    assert resume(request, 4, 8, BytesVocabulary()).ended == ended


@pytest.mark.parametrize("show_special", [False, True])
def test_a_replay_holds_back_what_was_held_back(show_special: bool) -> None:
    request = ask("a", stop=("<c>d",))
    request = request.model_copy(update={"delivered": (*b"ab", CONTROL), "show_special": show_special})
    resumed = resume(request, 4, 100, BytesVocabulary())
    assert resumed.text.push(b"d") == ""
    assert resumed.text.stopped_by == "<c>d"


def test_a_request_for_no_tokens_has_its_prompt_to_compute() -> None:
    assert resume(ask("a", max_tokens=0), 4, 4, BytesVocabulary()).ended is None
