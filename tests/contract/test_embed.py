"""The contract's commands that have one answer, against every runner: vectors, scores, tokens."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from exo.worker.protocol.commands import Cancel, Embed, Rank, Text, Tokenize
from exo.worker.protocol.events import Capabilities
from exo.worker.protocol.messages import MAX_TOKENIZED, PART_TOKENS
from exo.worker.runner_common.request_checks import within
from tests.contract.cases import CASES, Case, Shared, Start, Table, long_prompt
from tests.support.program import Program, Result, ask, names

VLLM = CASES["vllm"]


def vllm_table(folder: Path) -> Table:
    """The one kind of pooling for which vLLM computes a text in several steps."""
    return {**VLLM.table(folder), "pooling": "last"}


EMBEDDING = {**CASES, "vllm": replace(VLLM, tasks=("TextEmbedding",), table=vllm_table)}
"""vLLM makes vectors of a model that is loaded for nothing else."""
GENERATING = [name for name, case in EMBEDDING.items() if not case.tasks]

name = names()


@pytest.fixture
def cases() -> Mapping[str, Case]:
    return EMBEDDING


def embed(text: str | list[int]) -> Embed:
    return Embed(id=next(name), prompt=(Text(text=text),) if isinstance(text, str) else tuple(text))


def tokenize(text: str | list[int], *, special: bool = False) -> Tokenize:
    prompt = (Text(text=text, special=special),) if isinstance(text, str) else tuple(text)
    return Tokenize(id=next(name), prompt=prompt, add_bos=False)


def one(program: Program, request: Embed | Rank | Tokenize) -> Result:
    return program.generate(request)[0]


def test_a_text_becomes_a_vector_of_length_one(program: Program) -> None:
    assert isinstance(program.capabilities, Capabilities)
    assert program.capabilities.embeddings
    result = one(program, embed("once upon a time"))
    assert np.linalg.norm(result.embedded.vector) == pytest.approx(1)
    assert result.embedded.usage.prompt_tokens == result.prefill[0].total > 0
    assert result.embedded.usage.completion_tokens == 0
    assert result.after_end == []


def test_token_ids_are_embedded_as_they_are(program: Program) -> None:
    tokens = list(one(program, tokenize("hello world")).tokenized.tokens)
    by_text, by_ids = program.generate(embed("hello world"), embed(tokens))
    assert by_text.embedded.vector == pytest.approx(by_ids.embedded.vector, abs=1e-5)


def test_each_of_many_texts_gets_the_vector_that_it_gets_alone(program: Program) -> None:
    texts = [f"text {index} " * (1 + index % 9) for index in range(100)]
    together = [result.embedded.vector for result in program.generate(*map(embed, texts))]
    assert {len(vector) for vector in together} == {len(together[0])}
    assert len({vector[:2] for vector in together}) == 100
    for index in (0, 1, 50, 99):
        assert one(program, embed(texts[index])).embedded.vector == pytest.approx(together[index], abs=1e-5)


def test_a_text_longer_than_a_chunk_is_one_text(start: Start, shared: Shared) -> None:
    whole, cut = shared.program(start.case), shared.slow(start.case)
    texts = [long_prompt(500), long_prompt(501), long_prompt(7)]
    vectors = [[result.embedded.vector for result in each.generate(*map(embed, texts))] for each in (whole, cut)]
    assert vectors[0] == [pytest.approx(vector, abs=1e-5) for vector in vectors[1]]
    assert vectors[0][0] != pytest.approx(vectors[0][1], abs=1e-5)


def test_what_cannot_be_embedded_is_refused_by_name_and_disturbs_nobody(program: Program) -> None:
    good, more = embed("a good text"), embed("another")
    bad = [embed(""), embed([]), embed([97, 10**6]), embed([-1]), embed(long_prompt(513))]
    results = program.generate(good, *bad, more)
    assert [result.failed.param for result in results[1:-1]] == ["prompt"] * 5
    codes = [result.failed.code for result in results[1:-1]]
    assert codes == ["invalid_request"] * 4 + ["context_length_exceeded"]
    assert "1000000" in results[3].failed.message
    assert "513" in results[5].failed.message
    assert "512" in results[5].failed.message
    assert results[0].embedded.vector != results[-1].embedded.vector
    assert len(one(program, embed(long_prompt(512))).embedded.vector) > 0


def test_a_text_that_may_be_cut_is_cut_to_what_a_text_may_have(program: Program) -> None:
    def cut(text: str | list[int]) -> Embed:
        return embed(text).model_copy(update={"truncate": True})

    long = long_prompt(600)
    most, more, short = program.generate(embed(long[:512]), cut(long), cut(long[:7]))
    assert more.embedded.usage.prompt_tokens == 512
    assert more.embedded.vector == pytest.approx(most.embedded.vector, abs=1e-5)
    assert short.embedded.usage.prompt_tokens == 7
    texts = [one(program, each).embedded for each in (cut("once upon a time " * 500), embed("once upon a time"))]
    assert texts[0].usage.prompt_tokens == 512
    assert len(texts[0].vector) == len(texts[1].vector)
    assert one(program, cut("")).failed.code == "invalid_request"


def test_a_cut_text_keeps_the_control_tokens_at_its_end() -> None:
    def cut(tokens: list[int], closing: list[int], longest: int = 4, *, truncate: bool = True) -> list[int]:
        return within(Embed(id="x", prompt=(), truncate=truncate), tokens, longest, closing)

    assert cut([1, 5, 6, 7, 8, 2], [2]) == [1, 5, 6, 2]
    assert cut([1, 5, 6, 7, 8, 2], []) == [1, 5, 6, 7]
    assert cut([1, 5, 6, 7, 8], [2]) == [1, 5, 6, 7]
    assert cut([1, 5, 6, 2], [2]) == [1, 5, 6, 2]
    assert cut([1, 5, 6, 2, 3], [2, 3], longest=1) == [3]
    assert cut([1, 5, 6, 7, 2], [2], truncate=False) == [1, 5, 6, 7, 2]


@pytest.mark.parametrize("program", GENERATING, indirect=True)
def test_streams_go_on_unchanged_while_texts_are_embedded(program: Program) -> None:
    streams = [ask(next(name), f"story {index}", max_tokens=60, temperature=0.8, seed=index) for index in range(3)]
    undisturbed = [result.tokens for result in program.generate(*streams)]
    again = [each.model_copy(update={"id": next(name)}) for each in streams]
    texts = [embed(long_prompt(100 + index)) for index in range(20)]
    results = program.generate(again[0], *texts[:10], again[1], *texts[10:], again[2])
    streamed = [result for result in results if result.tokens]
    assert [result.tokens for result in streamed] == undisturbed
    assert sum(len(result.embedded.vector) > 0 for result in results if not result.tokens) == 20


def test_a_cancelled_text_ends_once_and_the_others_go_on(slow_program: Program) -> None:
    program = slow_program
    working, waiting, after = embed(long_prompt(2000)), embed(long_prompt(1999)), embed("after")
    program.send(working, waiting, after, Cancel(id=waiting.id), Cancel(id=working.id), Cancel(id=working.id))
    program.until(program.ended(working.id, waiting.id, after.id))
    assert [program.results[each.id].finished.reason for each in (working, waiting)] == ["cancelled"] * 2
    assert len(program.results[after.id].embedded.vector) > 0
    program.cancel(after.id)
    assert len(one(program, embed("one more")).embedded.vector) > 0
    assert all(result.after_end == [] for result in program.results.values())


def test_a_runner_is_running_while_it_embeds_and_ready_when_it_has(program: Program) -> None:
    program.generate(embed("a"), embed("b"))
    program.until(lambda: program.states[-1] == "Ready")
    seen = len(program.states)
    program.generate(embed("c"))
    program.until(lambda: len(program.states) == seen + 2)
    assert program.states[seen:] == ["Running", "Ready"]


def test_shutdown_fails_the_texts_that_wait(start: Start) -> None:
    program = start.slow(n_ctx=2048)
    texts = [embed(long_prompt(1500)) for _ in range(200)]
    program.send(*texts)
    program.until(program.ended(texts[0].id))
    assert program.shutdown() == 0
    ends = [program.results[each.id].end for each in texts]
    assert ends[-1] is not None
    assert program.results[texts[-1].id].failed.code == "shutdown"
    assert None not in ends


def test_before_a_model_is_loaded_nothing_is_answered(start: Start) -> None:
    program = start.bare()
    for early in (embed("text"), tokenize("text"), Rank(id=next(name), query="what", document="that")):
        assert one(program, early).failed.code == "invalid_request"


def test_a_model_without_a_head_for_it_ranks_nothing(start: Start, shared: Shared) -> None:
    program = shared.program(start.case) if start.case.samples else start.loaded(rerank=False)
    assert program.capabilities is not None
    assert not program.capabilities.rerank
    refused = one(program, Rank(id=next(name), query="what", document="that")).failed
    assert (refused.code, refused.param) == ("invalid_request", "model")


@pytest.mark.parametrize("text", ["once upon a time", " spaces  and\nlines", "é€😀 日本語", "<|im_end|><eos>"])
def test_the_bytes_of_a_texts_tokens_are_the_text(program: Program, text: str) -> None:
    answer = one(program, tokenize(text)).tokenized
    assert b"".join(map(bytes, answer.bytes)) == text.encode()
    assert len(answer.tokens) == len(answer.bytes) > 1
    again = one(program, tokenize(list(answer.tokens))).tokenized
    assert (again.tokens, again.bytes) == (answer.tokens, answer.bytes)


def test_a_control_token_has_its_text_for_bytes(program: Program) -> None:
    assert isinstance(program.capabilities, Capabilities)
    text = program.capabilities.eos_token
    answer = one(program, tokenize(text, special=True)).tokenized
    assert len(answer.tokens) == 1
    assert bytes(answer.bytes[0]) == text.encode()


def test_no_text_has_no_tokens_and_a_wrong_token_is_refused(program: Program) -> None:
    assert one(program, tokenize("")).tokenized.tokens == ()
    for wrong in (10**6, -1):
        refused = one(program, tokenize([97, wrong])).failed
        assert (refused.code, refused.param) == ("invalid_request", "prompt")
        assert str(wrong) in refused.message


def test_many_tokens_are_told_in_parts(program: Program) -> None:
    text = "".join(chr(97 + at * at % 23) for at in range(4 * PART_TOKENS))
    answer = one(program, tokenize(text))
    assert b"".join(map(bytes, answer.tokenized.bytes)) == text.encode()
    assert answer.parts == -(-len(answer.tokenized.tokens) // PART_TOKENS) > 1
    assert answer.after_end == []
    again = one(program, tokenize(list(answer.tokenized.tokens)))
    assert (again.tokenized.tokens, again.parts) == (answer.tokenized.tokens, answer.parts)
    assert program.longest < 1 << 20


def test_more_tokens_than_can_be_told_are_refused(program: Program) -> None:
    refused = one(program, tokenize([97] * (MAX_TOKENIZED + 1))).failed
    assert (refused.code, refused.param) == ("invalid_request", "prompt")
    assert str(MAX_TOKENIZED) in refused.message


@pytest.mark.parametrize("slow_program", GENERATING, indirect=True)
def test_tokens_are_told_while_the_engine_computes(slow_program: Program) -> None:
    program = slow_program
    (stream,) = islice(name, 1)
    program.send(ask(stream, max_tokens=None))
    program.until(lambda: stream in program.results and len(program.results[stream].tokens) > 0)
    assert len(one(program, tokenize("once upon a time")).tokenized.tokens) > 0
    assert program.results[stream].end is None
    program.cancel(stream)
    program.until(program.ended(stream))
