"""Backend sampling in llama.cpp: what it hands back of a row, and what is chosen from that."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from exo.worker.protocol.commands import Load, SamplingParams
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.loading.loader import Loaded, load
from exo.worker.runner_cuda.loading.options import CudaOptions
from exo.worker.runner_cuda.sampling.candidates import Candidates, NotFinite, Row
from exo.worker.runner_cuda.sampling.device_sampling import SIZES, Best, Gains, backend_sampling, needed
from exo.worker.runner_cuda.sampling.sampler import Sampler, choose
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.step import Chunk, Step
from tests.support.tiny import Shape, write_gguf
from tests.support.twins import FLOAT32


def command(path: Path, **table: JsonValue) -> Load:
    return Load(
        model_id="test/tiny", backend="LlamaCppCpu", table={**FLOAT32, "n_ctx": 512, "path": str(path), **table}
    )


# --- what is chosen from what is handed back ---


def handed_back(row: Row, size: int, order: np.random.Generator) -> Best:
    """Devices differ in the order of equal logits, and in which of those at the border they keep."""
    shuffled = order.permutation(row.size)
    kept = shuffled[np.argsort(-row[shuffled], kind="stable")][:size]
    kept = order.permutation(kept)
    return Best(kept.astype(np.intp), row[kept])


@settings(max_examples=400)
@given(
    st.integers(0, 10**6),
    st.sampled_from([300, 5000]),
    st.integers(0, 6),
    st.sampled_from([0, 1, 2, 40, 61]),
    st.sampled_from([(), (3,), (0, 1)]),
    st.sampled_from([(1.0, 0.0), (0.9, 0.0), (1.0, 0.1)]),
)
def test_a_choice_is_that_from_the_whole_row_or_left_open(
    seed: int, size: int, digits: int, k: int, forbidden: tuple[int, ...], limits: tuple[float, float]
) -> None:
    order = np.random.default_rng(seed)
    row = order.normal(0, 3, size).astype(np.float32).round(digits)
    row[order.integers(0, size, 5)] = -np.inf
    best = handed_back(row, SIZES[0], order)
    params = SamplingParams(seed=seed, temperature=0.7 if k else 0.0, top_k=k, top_p=limits[0], min_p=limits[1])
    sampler = Sampler(params, forbidden, ends_at=10)
    found = best.choice(sampler, 9)
    if found is None:
        assert np.unique(row).size < size - 4
    else:
        token = choose([found])[0] if isinstance(found, Candidates) else found
        assert token == sampler.choose(row.copy(), 9)


def test_ties_within_what_is_handed_back_are_settled_and_those_at_its_border_left_open() -> None:
    row = np.arange(100, dtype=np.float32)
    row[[7, 20, 93]] = 200
    best = handed_back(row, 10, np.random.default_rng(0))
    assert best.choice(Sampler(SamplingParams(seed=0, temperature=0)), 0) == 7
    two = best.choice(Sampler(SamplingParams(seed=0, temperature=1, top_k=2)), 0)
    assert isinstance(two, Candidates)
    assert two.ids.tolist() == [7, 20, 93]
    row[:] = 1
    for params in (SamplingParams(seed=0, temperature=0), SamplingParams(seed=0, temperature=1, top_k=3)):
        assert handed_back(row, 10, np.random.default_rng(0)).choice(Sampler(params), 0) is None


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_logit_handed_back_that_is_no_number_fails(wrong: float) -> None:
    logits = np.array([1, wrong, 2, 3], np.float32)
    for params in (SamplingParams(seed=0, temperature=0), SamplingParams(seed=0, temperature=1, top_k=2)):
        with pytest.raises(NotFinite):
            Best(np.arange(4), logits).choice(Sampler(params), 0)


# --- what llama.cpp does ---


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[Loaded]:
    write_gguf(tmp_path / "twin.gguf", Shape())
    done = load(command(tmp_path / "twin.gguf", slots=4, speculate=3, backend_sampling="on"), lambda _: None)
    yield done
    done.free()


def sequence(slot: int, n_tokens: int, **params: object) -> Sequence:
    sampler = Sampler(SamplingParams.model_validate({"seed": slot, **params}))
    return Sequence(str(slot), [slot + 5 + n for n in range(n_tokens)], n_tokens, n_tokens, 400, sampler, slot=slot)


def decode(loaded: Loaded, step: Step) -> int:
    """Computes the step from the beginning; how many rows gave logits."""
    batch, row, n_outputs = loaded.context.batch, 0, 0
    for chunk in step.chunks:
        end = row + chunk.n_rows
        batch.tokens[row:end] = chunk.sequence.tokens + chunk.draft
        batch.positions[row:end] = range(chunk.n_rows)
        batch.slots[row:end] = chunk.sequence.slot
        batch.outputs[row:end] = 0
        batch.outputs[end - chunk.n_sampled : end] = 1
        n_outputs += chunk.n_sampled
        row = end
        loaded.context.trim(chunk.sequence.slot, 0)
    loaded.context.decode(row)
    return n_outputs


def test_what_is_handed_back_are_the_largest_logits_as_computed_also_of_a_draft(loaded: Loaded) -> None:
    sampling = loaded.sampling
    sequences = [
        sequence(0, 3, temperature=0),
        sequence(1, 2, temperature=1, top_k=40),
        sequence(2, 4, temperature=1, top_p=0.9),
        sequence(3, 1, temperature=1, top_k=100),
    ]
    step = Step([Chunk(each, 0, len(each.tokens), draft=[9, 8, 7][: each.slot]) for each in sequences], [])
    sampling.stop()
    whole = loaded.context.logits(decode(loaded, step)).copy()
    sampling.prepare(step)
    loaded.context.logits(len(whole))[:] = 0
    decode(loaded, step)
    found = sampling.read(step)
    assert {slot: len(rows) for slot, rows in found.items()} == {0: 1, 1: 2, 3: 4}
    assert [rows[0].ids.size for rows in found.values()] == [64, 64, 256]
    at = 0
    for chunk in step.chunks:
        for place, best in enumerate(found.get(chunk.sequence.slot, [])):
            row = whole[at + place]
            assert np.array_equal(best.logits, row[best.ids])
            assert np.array_equal(np.sort(best.logits), np.sort(row)[-best.ids.size :])
        at += chunk.n_sampled
    assert np.array_equal(loaded.context.logits(len(whole))[3:6], whole[3:6])


def test_a_step_of_such_rows_alone_copies_no_whole_row(loaded: Loaded) -> None:
    sampling = loaded.sampling
    step = Step([Chunk(sequence(slot, 2, temperature=0), 0, 2) for slot in range(4)], [])
    sampling.prepare(step)
    loaded.context.logits(4)[:] = 77
    decode(loaded, step)
    assert (loaded.context.logits(4) == 77).all()
    assert all(sampling.chains.count(row, 4) == SIZES[0] for row in range(4))


def test_a_slot_keeps_its_chain_for_requests_that_need_no_more(loaded: Loaded) -> None:
    sampling = loaded.sampling

    def size(request: Sequence) -> int:
        step = Step([Chunk(request, 0, len(request.tokens))], [])
        sampling.prepare(step)
        decode(loaded, step)
        return sampling.chains.count(0, 1)

    assert size(sequence(0, 2, temperature=1, top_k=200)) == 256
    assert size(sequence(0, 2, temperature=0)) == 256
    assert size(sequence(0, 2, temperature=1, top_k=300)) == 0
    assert size(sequence(0, 2, temperature=0)) == 64
    doubted = sequence(0, 2, temperature=0)
    sampling.read_whole(doubted)
    assert size(doubted) == 0
    assert size(sequence(0, 2, temperature=1, top_k=3)) == 64


def test_each_step_decides_by_its_rows_whether_there_are_chains(loaded: Loaded) -> None:
    sampling = loaded.sampling
    sampling.gains = Gains({1: -0.004, 3: 0.003}, change=0.01)

    def reduced(n_rows: int, **params: object) -> int:
        """The rows that a chain has reduced."""
        step = Step([Chunk(sequence(slot, 1, **params), 0, 1) for slot in range(n_rows)], [])
        sampling.prepare(step)
        decode(loaded, step)
        return sum(sampling.chains.count(row, n_rows) > 0 for row in range(n_rows))

    greedy = {"temperature": 0}
    assert reduced(4, **greedy) == 4
    assert [reduced(1, **greedy) for _ in range(4)] == [1, 1, 0, 0]
    assert [reduced(4, temperature=1) for _ in range(5)] == [0] * 5
    assert [reduced(4, **greedy) for _ in range(5)] == [0, 0, 0, 4, 4]
    assert reduced(1, **greedy) == 1


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1},
        {"temperature": 1, "min_p": 0.1},
        {"temperature": 0, "logit_bias": {3: 1.0}},
        {"temperature": 0, "frequency_penalty": 0.1},
        {"temperature": 0, "presence_penalty": 0.1},
        {"temperature": 0, "repetition_penalty": 1.1},
    ],
)
def test_whatever_changes_logits_or_needs_them_all_gets_them_all(params: dict[str, object]) -> None:
    assert needed(sequence(0, 2, **params)) == 0


def test_finding_out_whether_it_is_faster_leaves_no_trace(tmp_path: Path) -> None:
    """The measurement is that for GPUs. On a CPU, which computes whole rows anyway, either outcome is possible."""
    write_gguf(tmp_path / "twin.gguf", Shape())
    done = load(command(tmp_path / "twin.gguf", slots=4), lambda _: None)
    chains = done.sampling.chains
    step = Step([Chunk(sequence(slot, 3, temperature=1), 0, 3) for slot in range(4)], [])
    before = done.context.logits(decode(done, step)).copy()
    options = CudaOptions(path="twin.gguf", slots=4)
    for slot in range(4):
        done.context.trim(slot, 0)
    found = backend_sampling(done.context, chains, options, can_cut=True, on_gpus=True)
    found.prepare(step)
    assert np.array_equal(done.context.logits(decode(done, step)), before)
    assert chains.count(0, 4) == 0
    for unfit in ({"can_cut": False, "on_gpus": True}, {"can_cut": True, "on_gpus": False}):
        assert backend_sampling(done.context, chains, options, **unfit).sizes == ()
    drafting = options.model_copy(update={"speculate": 3})
    assert backend_sampling(done.context, chains, drafting, can_cut=True, on_gpus=True).sizes == ()
    asked = options.model_copy(update={"backend_sampling": "on"})
    with pytest.raises(LoadError, match=r"backend_sampling: .* cannot drop a sequence's last token"):
        backend_sampling(done.context, chains, asked, can_cut=False, on_gpus=False)
    done.free()
