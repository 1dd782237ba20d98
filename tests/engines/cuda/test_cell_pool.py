"""Slots that share one pool of cells: who enters it, who gives cells up, and that no token changes by it."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Estimate, Generate, Load
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.loading.estimate import estimate
from tests.support.edited_gguf import spoil
from tests.support.program import Program, Result, ask, names, runner_command
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.hybrid import write_hybrid
from tests.support.twins import FLOAT32

CELLS = 1024
name = names()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts a runner whose four slots share ``CELLS`` cells, unless the table says otherwise."""
    write_gguf(tmp_path / "tiny.gguf", Shape())
    with ExitStack() as stack:

        def start(**more: JsonValue) -> Program:
            table: dict[str, JsonValue] = {
                **FLOAT32,
                "path": str(tmp_path / "tiny.gguf"),
                "kv": "pool",
                "n_ctx": CELLS,
                "slots": 4,
                "prefix_cache_bytes": 64 << 20,
            }
            program = stack.enter_context(Program(runner_command("exo.worker.runner_cuda")))
            program.load(Load(model_id="test/tiny", backend="LlamaCppCpu", table={**table, **more}))
            return program

        yield start


def text(seed: int, length: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(97, 123) for _ in range(length)]


def undisturbed(program: Program, *requests: Generate) -> list[list[int]]:
    """The tokens of each request if it runs alone, without a cached prefix."""
    alone = [each.model_copy(update={"id": next(name)}) for each in requests]
    return [program.generate(each)[0].tokens for each in alone]


def tokens(results: list[Result]) -> list[list[int]]:
    assert all(each.after_end == [] for each in results)
    return [each.tokens for each in results]


def test_one_long_request_uses_nearly_all_cells_while_two_short_ones_run(start: Callable[..., Program]) -> None:
    program, cold = start(), start(kv="split", slots=1, prefix_cache_bytes=0)
    assert program.capabilities is not None
    assert (program.capabilities.context_length, program.capabilities.slots) == (CELLS, 4)
    long = ask(next(name), text(0, 700), max_tokens=150)
    short = [ask(next(name), text(each, 30), max_tokens=40, seed=each, temperature=1) for each in (1, 2)]
    program.send(long, *short)
    program.until(program.ended(*(each.id for each in short)))
    assert program.results[long.id].end is None
    program.until(program.ended(long.id))
    assert tokens([program.results[each.id] for each in (long, *short)]) == undisturbed(cold, long, *short)


def test_a_request_that_does_not_fit_waits_and_no_later_one_overtakes_it(start: Callable[..., Program]) -> None:
    program, cold = start(), start(kv="split", slots=1, prefix_cache_bytes=0)
    first = ask(next(name), text(0, 400), max_tokens=200)
    large = ask(next(name), text(1, 300), max_tokens=500)
    small = ask(next(name), text(2, 20), max_tokens=20)
    program.send(first, large, small)
    program.until(program.ended(first.id))
    assert program.results[large.id].tokens == program.results[small.id].tokens == []
    program.until(program.ended(large.id, small.id))
    assert len(program.results[large.id].tokens) == 500
    assert tokens([program.results[each.id] for each in (first, large, small)]) == undisturbed(
        cold, first, large, small
    )


@pytest.mark.parametrize("room", [64 << 20, 0], ids=["kept in RAM", "computed again"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("speculate", ["off", 4])
def test_when_cells_run_out_the_youngest_is_parked_and_goes_on_without_a_changed_token(
    start: Callable[..., Program], temperature: float, room: int, speculate: str | int
) -> None:
    program = start(prefix_cache_bytes=room, speculate=speculate)
    cold = start(kv="split", slots=1, prefix_cache_bytes=0)
    requests = [
        ask(next(name), text(each, 100 + each), max_tokens=600, seed=each, temperature=temperature).model_copy(
            update={"logprobs": 1}
        )
        for each in range(3)
    ]
    oldest, middle, youngest = (each.id for each in requests)
    program.send(*requests)
    program.until(program.ended(oldest))
    assert len(program.results[youngest].tokens) < 400
    program.until(program.ended(middle, youngest))
    results = [program.results[each.id] for each in requests]
    assert tokens(results) == undisturbed(cold, *requests)
    for result in results:
        assert len(result.logprobs) == len(result.tokens) == 600
        assert result.finished.usage.completion_tokens == 600
        processed = [each.processed for each in result.prefill]
        assert processed == sorted(processed)


def test_log_probabilities_of_a_prompt_are_told_once_if_it_is_computed_again(start: Callable[..., Program]) -> None:
    program, cold = start(prefix_cache_bytes=0), start(kv="split", slots=1, prefix_cache_bytes=0)
    running = ask(next(name), text(0, 100), max_tokens=900)
    prompt = ask(next(name), text(1, 500), max_tokens=4).model_copy(update={"prompt_logprobs": 0})
    program.send(running)
    program.until(lambda: running.id in program.results and len(program.results[running.id].tokens) > 400)
    results = program.generate(prompt)
    (expected,) = cold.generate(prompt.model_copy(update={"id": next(name)}))
    scores = [[item.chosen.logprob for item in each.prompt_logprobs[0].items] for each in (*results, expected)]
    assert len(scores[0]) == 500
    assert scores[0][1:] == pytest.approx(scores[1][1:], abs=1e-4)
    assert tokens(results) == [expected.tokens]


def test_a_parked_request_can_be_cancelled(start: Callable[..., Program]) -> None:
    program, cold = start(), start(kv="split", slots=1, prefix_cache_bytes=0)
    older, parked, later = (ask(next(name), text(each, 100), max_tokens=800, seed=each) for each in range(3))
    program.send(older, parked)
    program.until(lambda: len(program.results[older.id].tokens) > 600 if older.id in program.results else False)
    assert len(program.results[parked.id].tokens) < 500
    program.cancel(parked.id)
    program.until(program.ended(parked.id))
    assert program.results[parked.id].finished.reason == "cancelled"
    assert program.results[older.id].end is None
    (result,) = program.generate(later)
    program.until(program.ended(older.id))
    assert tokens([program.results[older.id], result]) == undisturbed(cold, older, later)


def test_a_runner_that_dies_with_a_parked_request_loses_no_token(start: Callable[..., Program]) -> None:
    program, cold = start(), start(kv="split", slots=1, prefix_cache_bytes=0)
    older, parked = (ask(next(name), text(each, 100), max_tokens=800, seed=each, temperature=1) for each in range(2))
    program.send(older, parked)
    program.until(lambda: older.id in program.results and len(program.results[older.id].tokens) > 600)
    program.process.kill()
    delivered = [program.results[each.id].tokens for each in (older, parked)]
    assert 0 < len(delivered[1]) < 500
    other = start()
    again = [
        each.model_copy(update={"id": next(name), "delivered": tuple(known)})
        for each, known in zip((older, parked), delivered, strict=True)
    ]
    rest = other.generate(*again)
    whole = [known + each.tokens for known, each in zip(delivered, rest, strict=True)]
    assert whole == undisturbed(cold, older, parked)


def test_a_prefix_is_shared_and_not_copied(start: Callable[..., Program]) -> None:
    """Four requests of 600 tokens each would not fit into the pool if each had cells of its own."""
    program, cold = start(), start(kv="split", slots=1, prefix_cache_bytes=0)
    prefix = text(0, 600)
    program.generate(ask(next(name), prefix, max_tokens=1))
    requests = [ask(next(name), [*prefix, *text(each, 10)], max_tokens=60, seed=each) for each in range(1, 5)]
    program.send(*requests)
    program.until(program.ended(requests[0].id))
    assert all(program.results[each.id].tokens for each in requests)
    program.until(program.ended(*(each.id for each in requests)))
    results = [program.results[each.id] for each in requests]
    # The last two prompts have the next token in common, which counts if one of them is ahead.
    assert all(each.finished.usage.cached_tokens in (600, 601) for each in results)
    assert tokens(results) == undisturbed(cold, *requests)


def test_prefixes_of_free_slots_give_way_and_come_back_from_ram(start: Callable[..., Program]) -> None:
    program = start()
    prompts = [text(each, 450) for each in range(4)]
    for prompt in prompts:
        program.generate(ask(next(name), prompt, max_tokens=4))
    for prompt in prompts:
        (result,) = program.generate(ask(next(name), [*prompt, 97, 98], max_tokens=4))
        assert result.finished.usage.cached_tokens >= 450


def test_a_request_whose_cells_are_no_numbers_fails_and_the_others_go_on(
    start: Callable[..., Program], tmp_path: Path
) -> None:
    """Without flash attention its cells spoil the results of all sequences in the pool."""
    cold = start(kv="split", slots=1, prefix_cache_bytes=0)
    spoil(tmp_path / "tiny.gguf", tmp_path / "bad.gguf", "token_embd.weight", token=32)
    program = start(path=str(tmp_path / "bad.gguf"))
    never: dict[str, Any] = {"logit_bias": {32: -1000.0}}
    running = [ask(next(name), text(each, 100), max_tokens=200, seed=each, temperature=1, **never) for each in range(2)]
    failing = ask(next(name), [*text(2, 80), 32, *text(3, 80)], max_tokens=4)
    program.send(*running)
    program.until(lambda: all(each.id in program.results and program.results[each.id].tokens for each in running))
    program.send(failing)
    program.until(program.ended(failing.id, *(each.id for each in running)))
    assert program.results[failing.id].failed.code == "engine_error"
    assert tokens([program.results[each.id] for each in running]) == undisturbed(cold, *running)
    later = ask(next(name), [*text(2, 80), *text(4, 10)], max_tokens=20, **never)
    assert tokens(program.generate(later)) == undisturbed(cold, later)


def test_random_conversations_have_the_tokens_of_cold_runs(start: Callable[..., Program]) -> None:
    """Several at a time, of all lengths, with common beginnings, cancelled requests and little RAM for prefixes."""
    program, cold = start(prefix_cache_bytes=1 << 20, speculate=2), start(kv="split", slots=1, prefix_cache_bytes=0)
    for seed in range(12):
        dice = random.Random(seed)
        conversations = [text(dice.randrange(3), dice.randrange(40, 400)) for _ in range(4)]
        for _ in range(3):
            requests: list[Generate] = []
            for prompt in conversations:
                length = dice.randrange(1, CELLS - len(prompt))
                request = ask(next(name), prompt, max_tokens=min(length, 120), seed=seed, temperature=dice.randrange(2))
                if dice.randrange(4) == 0:
                    request = request.model_copy(update={"max_tokens": None, "stop": ("a",), "ignore_eos": False})
                requests.append(request)
            cancelled = ask(next(name), text(seed, 200), max_tokens=700)
            program.send(*requests[:2], cancelled, *requests[2:])
            program.cancel(cancelled.id)
            program.until(program.ended(cancelled.id, *(each.id for each in requests)))
            results = [program.results[each.id] for each in requests]
            got = tokens(results)
            assert got == undisturbed(cold, *requests)
            conversations = [
                [*prompt, *reply, *text(seed, dice.randrange(1, 60))][: CELLS - 200]
                for prompt, reply in zip(conversations, got, strict=True)
            ]


@pytest.mark.parametrize(
    ("model", "more", "obstacle"),
    [
        ("sliding window", {}, "layers with a sliding window overwrite cells"),
        ("hybrid", {}, "recurrent layers have a state for each slot"),
        ("full", {"draft": {"path": "full.gguf"}}, "a draft model has a part of its cache for each slot"),
        ("full", {"exact": True}, "exact needs cells that no other sequence's are among"),
        ("full", {"cache_reuse": 64}, "cache_reuse needs the only slot"),
    ],
)
def test_where_cells_cannot_be_shared_loading_and_the_estimate_say_so(
    tmp_path: Path, model: str, more: dict[str, JsonValue], obstacle: str
) -> None:
    write_gguf(tmp_path / "full.gguf", Shape())
    write_gguf(tmp_path / "sliding window.gguf", Shape("gemma3"))
    write_hybrid(tmp_path / "hybrid.gguf")
    table: dict[str, JsonValue] = {"path": f"{model}.gguf", "kv": "pool", "n_ctx": CELLS, **more}
    load = Load(model_id="test/tiny", backend="LlamaCppCpu", table=table, directories=(str(tmp_path),))
    said = f'model card, [cuda] kv: "pool" is not possible: {obstacle}'
    with Program(runner_command("exo.worker.runner_cuda")) as program:
        program.send(load)
        program.until(lambda: program.failure is not None or "Ready" in program.states)
        assert program.failure is not None
        assert program.failure.code == "model_misconfigured"
        assert said in program.failure.message
    with pytest.raises(LoadError) as refused:
        estimate(Estimate(load=load))
    assert refused.value.code == "model_misconfigured"
    assert said in str(refused.value)
