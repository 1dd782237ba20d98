"""What runner_mlx promises beyond the contract: sliding windows, rows that come and go, rows that fail, and the same
text as runner_cuda from the same weights.

``mlx_lm.server`` fails on an exact prefix hit, on several prompts at once, on a stop string that is tokenized otherwise
and on a seed in a batch; all but the first of these are in the contract's tests.
"""

import resource
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from exo.worker.protocol.commands import Generate, SamplingParams
from tests.support.program import Program, Result, ask, names
from tests.support.tiny import Shape, write_mlx
from tests.support.tiny.shape import ARCHITECTURES, Architecture
from tests.support.twins import Models, Start

name = names()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def start(models: Models) -> Iterator[Start]:
    starter = Start(models)
    yield starter
    starter.stop()


def one(program: Program, request: Generate) -> Result:
    return program.generate(request)[0]


def begun(program: Program, *requests: str) -> Callable[[], bool]:
    """A condition for ``until``: all of these requests have a token."""
    return lambda: all(request in program.results and program.results[request].tokens for request in requests)


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(33, 127, tokens).tolist()


# --- the cache ---


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_prefix_is_reused_wherever_it_ends_even_past_a_sliding_window(
    start: Start, architecture: Architecture
) -> None:
    """gemma3's window is 16 tokens here; a cache that had forgotten older ones could not go back to them."""
    program = start.mlx(start.models.mlx(architecture), slots=1)
    fresh = start.mlx(start.models.mlx(architecture), slots=1)
    first = one(program, ask(next(name), prompt(200), max_tokens=40))
    again = one(program, ask(next(name), prompt(200), max_tokens=40))
    assert again.tokens == first.tokens
    assert again.finished.usage.cached_tokens == 199

    exactly_all = one(program, ask(next(name), prompt(200) + first.tokens, max_tokens=5))
    assert exactly_all.finished.usage.cached_tokens == 239
    assert exactly_all.tokens == one(fresh, ask(next(name), prompt(200) + first.tokens, max_tokens=5)).tokens

    for shared in (150, 100, 33):
        branch = prompt(shared) + prompt(50, seed=shared)
        branched = one(program, ask(next(name), branch, max_tokens=20))
        assert branched.finished.usage.cached_tokens == shared
        assert branched.tokens == one(fresh, ask(next(name), branch, max_tokens=20)).tokens


def test_a_cancelled_prompt_leaves_a_prefix_that_is_still_right(start: Start) -> None:
    program = start.mlx(start.models.mlx("llama"), slots=1, prefill_chunk=32)
    cancelled, long = next(name), prompt(3000)
    program.send(ask(cancelled, long))
    program.until(lambda: cancelled in program.results and program.results[cancelled].prefill[-1].processed >= 320)
    program.cancel(cancelled)
    program.until(program.ended(cancelled))
    result = one(program, ask(next(name), long[:300], max_tokens=20))
    assert result.finished.usage.cached_tokens == 299
    assert (
        result.tokens == one(start.shared(start.models.mlx("llama")), ask(next(name), long[:300], max_tokens=20)).tokens
    )


# --- rows that come and go ---


def crowd(*, seeded: bool) -> list[Generate]:
    """Prompts and lengths of all sizes, and every kind of sampling parameters."""
    kinds = [SamplingParams(seed=0, temperature=0)]
    if seeded:
        kinds = [
            SamplingParams(seed=1),
            SamplingParams(seed=2, temperature=0.7, top_k=20, top_p=0.9),
            SamplingParams(seed=3, temperature=1.2, min_p=0.02, repetition_penalty=1.3),
            SamplingParams(seed=4, temperature=0, frequency_penalty=0.7, presence_penalty=0.2),
            SamplingParams(seed=5, temperature=0.9, logit_bias={100: 2.0}),
        ]
    lengths = [(3, 60), (90, 5), (17, 33), (1, 12), (64, 44), (200, 9), (5, 50), (40, 21)]
    return [
        ask(next(name), prompt(n, seed=n), max_tokens=m).model_copy(update={"sampling": kinds[index % len(kinds)]})
        for index, (n, m) in enumerate(lengths)
    ]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("seeded", [False, True])
def test_rows_that_join_and_leave_do_not_change_each_other(
    start: Start, architecture: Architecture, seeded: bool
) -> None:
    program = start.shared(start.models.mlx(architecture), slots=5)
    alone = [one(program, request).tokens for request in crowd(seeded=seeded)]
    together = crowd(seeded=seeded)
    for index, request in enumerate(together):
        program.send(request)
        if index % 2:
            program.until(begun(program, request.id))
    program.until(program.ended(*(request.id for request in together)))
    assert [program.results[request.id].tokens for request in together] == alone


def test_a_request_goes_on_after_its_neighbours_were_cancelled(start: Start) -> None:
    program = start.shared(start.models.mlx("llama"), slots=5)
    alone = one(program, ask(next(name), prompt(10), max_tokens=900))
    ids = list(islice(name, 4))
    program.send(*(ask(request, prompt(10 + index), max_tokens=900) for index, request in enumerate(ids)))
    program.until(begun(program, *ids))
    program.cancel(ids[1])
    program.cancel(ids[2])
    program.until(program.ended(*ids))
    assert [program.results[request].finished.reason for request in ids] == [
        "length",
        "cancelled",
        "cancelled",
        "length",
    ]
    assert program.results[ids[0]].tokens == alone.tokens


def test_decoding_goes_on_while_a_long_prompt_is_prefilled(start: Start) -> None:
    program = start.mlx(start.models.mlx("llama"), slots=2, prefill_chunk=32)
    short, long = islice(name, 2)
    program.send(ask(short, max_tokens=3000))
    program.until(begun(program, short))
    program.send(ask(long, prompt(2000)))
    program.until(lambda: long in program.results and program.results[long].prefill[-1].processed > 0)
    before = len(program.results[short].tokens)
    program.until(lambda: program.results[long].prefill[-1].processed == 2000)
    chunks = len(program.results[long].prefill) - 2
    assert chunks >= 60
    assert len(program.results[short].tokens) - before >= chunks - 1


# --- a row that fails ---


def test_a_row_whose_logits_are_no_numbers_fails_alone_and_spoils_no_slot(start: Start, tmp_path: Path) -> None:
    spoilt = 200
    write_mlx(tmp_path, Shape())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][spoilt] = np.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    program = start.mlx(tmp_path, slots=2)
    alone = one(program, ask(next(name), prompt(4), max_tokens=30))

    neighbour, failing = islice(name, 2)
    program.send(ask(neighbour, prompt(100), max_tokens=3900), ask(failing, [*prompt(5), spoilt, *prompt(60)]))
    program.until(program.ended(failing))
    assert program.results[failing].failed.code == "engine_error"
    beside = one(program, ask(next(name), prompt(4), max_tokens=30))
    assert program.results[neighbour].end is None
    assert beside.tokens == alone.tokens
    so_far = len(program.results[neighbour].tokens)
    program.until(lambda: len(program.results[neighbour].tokens) > so_far)


# --- the other engine ---


def texts(program: Program, prompts: Sequence[str]) -> list[list[int]]:
    return [result.tokens for result in program.generate(*(ask(next(name), each, max_tokens=48) for each in prompts))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_text_is_that_of_llama_cpp_on_the_same_weights(start: Start, architecture: Architecture) -> None:
    prompts = ["once upon a time", "naïve café", "The stopper and the world: 1234 things; don't!", "x"]
    mlx = texts(start.shared(start.models.mlx(architecture)), prompts)
    assert mlx == texts(start.cuda(start.models.gguf(architecture)), prompts)


# --- the process ---


def test_the_limit_of_open_files_is_left_as_it_was(start: Start) -> None:
    program = start.shared(start.models.mlx("llama"))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE) == limit
