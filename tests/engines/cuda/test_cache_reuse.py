"""``cache_reuse``, with llama.cpp itself: what follows a changed line of a prompt is used again at its new place."""

from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Cancel, Load
from tests.support.program import Program, ask
from tests.support.rpc_devices import llama_command
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.hybrid import write_hybrid
from tests.support.twins import FLOAT32


def program(path: Path, **more: JsonValue) -> Program:
    started = Program(llama_command("LlamaCppCpu"))
    started.send(Load(model_id="test/tiny", backend="LlamaCppCpu", table={"path": str(path), "n_ctx": 2048, **more}))
    started.until(lambda: started.failure is not None or "Ready" in started.states)
    return started


def words(seed: int, length: int, letters: range = range(97, 123)) -> list[int]:
    return Random(seed).choices(letters, k=length)


def logprobs(program: Program, prompt: list[int], n_cached: int, *, exact: bool = False) -> dict[int, float]:
    """The log-probabilities of the likeliest tokens after a prompt of which so many tokens were cached."""
    request = ask(f"r{len(program.results)}", prompt, max_tokens=1, temperature=0)
    (result,) = program.generate(request.model_copy(update={"logprobs": 20, "exact": exact}))
    assert result.finished.usage.cached_tokens == n_cached
    return {each.token: each.logprob or 0.0 for each in result.logprobs[0].top}


def farthest(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest difference of two log-probabilities of the same token."""
    return max(abs(one[token] - other[token]) for token in one.keys() & other.keys())


@dataclass(frozen=True, slots=True)
class Change:
    """A cached prompt, another one in which something differs, and how many of its tokens are in the first."""

    cached: list[int]
    prompt: list[int]
    n_same: int


def changes(seed: int) -> dict[str, Change]:
    head, body, tail = words(seed, 40), words(seed + 1, 700), words(seed + 2, 30)
    old = words(seed + 3, 9, range(48, 58))
    new, longer = words(seed + 4, 9, range(65, 91)), words(seed + 5, 25, range(65, 91))
    cached = [*head, *old, *body]
    return {
        "a line": Change(cached, [*head, *new, *body, *tail], 740),
        "a longer line": Change(cached, [*head, *longer, *body, *tail], 740),
        "a line less": Change(cached, [*head, *body, *tail], 740),
        "a line more": Change(cached, [*head, *old, *body[:300], *longer, *body[300:], *tail], 749),
        "two lines": Change(cached, [*head, *longer, *body[:300], *new, *body[320:], *tail], 720),
        "one less, one more": Change(cached, [*head, *body[:300], *longer, *body[300:], *tail], 740),
    }


def test_the_cells_behind_a_change_are_used_at_their_new_places(tmp_path: Path) -> None:
    """The cells of a model's first layer do not depend on earlier tokens, so a model without others is exact."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, Shape(layers=1))
    with program(path, cache_reuse=64, **FLOAT32) as moving, program(path, slots=1, **FLOAT32) as plain:
        for index, name in enumerate(changes(0)):
            change = changes(1000 * index)[name]
            logprobs(moving, change.cached, 0)
            found = logprobs(moving, change.prompt, change.n_same)
            assert farthest(found, logprobs(plain, change.prompt, 0)) < 1e-3, name
            tail = [*change.prompt[:-10], *words(index, 40)]  # a prefix of what has moved
            found = logprobs(moving, tail, len(change.prompt) - 10)
            assert farthest(found, logprobs(plain, tail, len(change.prompt) - 10)) < 1e-3, name


def test_a_conversation_that_has_lost_the_slot_is_moved_from_ram(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, Shape(layers=1))
    with program(path, cache_reuse=64, **FLOAT32) as moving, program(path, slots=1, **FLOAT32) as plain:
        change = changes(0)["two lines"]
        logprobs(moving, change.cached, 0)
        logprobs(moving, words(99, 800), 0)
        found = logprobs(moving, change.prompt, change.n_same)
        assert farthest(found, logprobs(plain, change.prompt, 0)) < 1e-3


def test_a_request_that_must_be_repeatable_uses_no_moved_cells(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, Shape(layers=3))
    with program(path, cache_reuse=64, **FLOAT32) as moving, program(path, slots=1, **FLOAT32) as plain:
        change = changes(0)["a longer line"]
        expected = logprobs(plain, change.prompt, 0)
        logprobs(moving, change.cached, 0)
        assert farthest(logprobs(moving, change.prompt, change.n_same), expected) > 1e-3
        for n_cached in (65, len(change.prompt) - 1):
            found = logprobs(moving, change.prompt, n_cached, exact=True)
            assert farthest(found, expected) < 1e-4, n_cached


def test_a_request_that_ends_while_cells_wait_for_it_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, Shape(layers=1))
    with program(path, cache_reuse=64, n_ubatch=32, **FLOAT32) as moving, program(path, slots=1, **FLOAT32) as plain:
        change = changes(0)["a line"]
        longer = [*change.prompt[:40], *words(7, 1000, range(65, 91)), *change.prompt[40:]]
        logprobs(moving, change.cached, 0)
        moving.send(ask("left", longer, max_tokens=1))
        moving.until(lambda: "left" in moving.results and len(moving.results["left"].prefill) > 2)
        moving.send(Cancel(id="left"))
        moving.until(lambda: moving.results["left"].end is not None)
        assert farthest(logprobs(moving, words(8, 900), 0), logprobs(plain, words(8, 900), 0)) < 1e-3


@pytest.mark.parametrize(
    ("architecture", "more", "said"),
    [
        ("llama", {"slots": 2}, "cache_reuse needs slots = 1, not 2"),
        ("llama", {"exact": True}, "cache_reuse changes results, which exact forbids"),
        ("llama", {"cache_type_k": "q8_0"}, "cache_reuse needs a cache_type_k among f32, f16, bf16, not q8_0"),
        ("gemma3", {}, "cache_reuse: this model's cache cannot be used at other positions"),
        ("hybrid", {}, "cache_reuse: this model's cache cannot be used at other positions"),
    ],
)
def test_where_cells_cannot_be_moved_loading_says_so(
    tmp_path: Path, architecture: str, more: dict[str, JsonValue], said: str
) -> None:
    path = tmp_path / "tiny.gguf"
    if architecture == "hybrid":
        write_hybrid(path)
    else:
        write_gguf(path, Shape("gemma3" if architecture == "gemma3" else "llama"))
    with program(path, cache_reuse=64, **more) as refused:
        assert refused.failure is not None
        assert refused.failure.code == "model_misconfigured"
        assert said in refused.failure.message
