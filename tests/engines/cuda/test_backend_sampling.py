"""Backend sampling of the llama.cpp runner: the same tokens, whatever is handed back of a row and in what company."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import JsonValue, ValidationError

from exo.worker.protocol.commands import Generate, Grammar, Load, ReasoningLimit, SamplingParams
from exo.worker.protocol.runners import RUNNERS
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.loading.loader import load
from exo.worker.runner_cuda.loading.options import CudaOptions
from exo.worker.runner_cuda.prefix.cache import PrefixCache
from exo.worker.runner_cuda.sampling.sampler import Sampler
from exo.worker.runner_cuda.scheduler import Scheduler
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.speculation.speculation import Speculation
from exo.worker.runner_cuda.step_time import Pace
from tests.support.cells import RecordedCells
from tests.support.edited_gguf import spoil
from tests.support.program import Program, Result, ask, names, runner_command
from tests.support.rpc_devices import llama_command
from tests.support.tiny import Shape, write_gguf, write_scripted
from tests.support.tiny.encoder import Encoder
from tests.support.twins import FLOAT32

name = names()
COMMAND = runner_command(RUNNERS["cuda"].module)
WORDS = re.findall(" [a-z]+", " the old man and his dog went over a hill to see what was there")
SAID = [*range(256, 256 + len(WORDS)), ord("\n")]


def command(path: Path, backend: str = "LlamaCppCpu", **table: JsonValue) -> Load:
    return Load(model_id="test/tiny", backend=backend, table={**FLOAT32, "n_ctx": 512, "path": str(path), **table})


# --- whole requests ---


@dataclass(frozen=True, slots=True)
class Pair:
    """The same model twice, with backend sampling and without."""

    runners: tuple[Program, Program]

    def both(self, *requests: Generate) -> list[Result]:
        """The results, which are the same."""
        on, off = ([*runner.generate(*requests)] for runner in self.runners)
        for one, other in zip(on, off, strict=True):
            assert one.tokens == other.tokens
            assert (one.text, one.logprobs, one.prompt_logprobs) == (other.text, other.logprobs, other.prompt_logprobs)
            assert type(one.end) is type(other.end)
        return on


@pytest.fixture(
    scope="module", params=["llama", "gemma3", "scripted", "drafting", "llama on devices", "drafting on devices"]
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """ "scripted" computes the same logit for nearly all tokens, so that equals are at every border."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    table: dict[str, JsonValue] = {"slots": 3}
    kind, _, on_devices = request.param.partition(" ")
    if kind in ("scripted", "drafting"):
        write_scripted(path, WORDS)
        table["speculate"] = 6 if kind == "drafting" else "off"
    else:
        write_gguf(path, Shape(architecture=kind))
    backend = "LlamaCppCuda" if on_devices else "LlamaCppCpu"
    with Program(llama_command(backend)) as on, Program(llama_command(backend)) as off:
        on.load(command(path, backend, backend_sampling="on", **table))
        off.load(command(path, backend, backend_sampling="off", **table))
        yield Pair((on, off))


def mixed(seed: int) -> list[Generate]:
    """More requests than slots, so that those change what they hand back while others go on."""
    kinds: list[dict[str, object]] = [
        {},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
        {"temperature": 1.3},
        {"temperature": 0.7, "top_k": 1},
        {"temperature": 1.0, "top_k": 200, "min_p": 0.02},
        {"temperature": 0.9, "top_k": 310},
        {"frequency_penalty": 1.0},
        {"temperature": 0.9, "top_k": 50, "ignore_eos": False},
    ]
    requests = [
        ask(next(name), SAID[at:] if at % 2 else [97 + at] * 9 + SAID, seed=seed + at, max_tokens=12 + 3 * at, **kind)  # type: ignore[arg-type]
        for at, kind in enumerate(kinds)
    ]
    scored = ask(next(name), SAID, max_tokens=9).model_copy(update={"logprobs": 2, "prompt_logprobs": 1})
    grammar = Grammar(syntax="regex", source="[a-d ]{12}")
    constrained = ask(next(name), SAID, max_tokens=20).model_copy(update={"grammar": grammar})
    limit = ReasoningLimit(max_tokens=5 + seed, begin="<think>", end="</think>", closing="</think>\n", inside=True)
    closed = [
        ask(next(name), SAID, max_tokens=30, temperature=temperature, top_k=40, seed=seed) for temperature in (0.0, 0.9)
    ]
    bounded = [each.model_copy(update={"reasoning": limit, "ignore_eos": True}) for each in closed]
    return [*requests, scored, constrained, *bounded]


def test_every_request_gets_the_same_tokens_in_mixed_company(pair: Pair) -> None:
    for seed in (1, 2):
        pair.both(*mixed(seed))


def test_one_request_after_another_gets_the_same_tokens_also_from_the_prefix_cache(pair: Pair) -> None:
    for k in (0, 1, 2, 40, 61, 62, 100, 253, 319, 1000):
        temperature = 0.0 if k == 0 else 1.0
        [result] = pair.both(ask(next(name), SAID * 4, temperature=temperature, seed=k, top_k=k, max_tokens=20))
        assert len(result.tokens) == 20
    assert result.finished.usage.cached_tokens > 0


def test_a_request_goes_on_with_the_same_tokens_in_another_runner(pair: Pair) -> None:
    on, off = pair.runners
    request = ask(next(name), SAID, temperature=0.8, top_k=40, seed=4, max_tokens=24)
    [whole] = on.generate(request)
    for cut in (0, 1, 9, 23):
        rest = request.model_copy(update={"id": next(name), "delivered": tuple(whole.tokens[:cut])})
        for runner in (on, off):
            [continued] = runner.generate(rest)
            del runner.results[rest.id]
            assert whole.tokens[:cut] + continued.tokens == whole.tokens


def test_a_cancelled_request_leaves_the_others_as_they_are(pair: Pair) -> None:
    on, off = pair.runners
    left = ask(next(name), SAID, max_tokens=None)
    others = [ask(next(name), SAID, temperature=1.0, top_k=k, seed=k, max_tokens=60) for k in (5, 100)]
    on.send(left, *others)
    on.until(lambda: left.id in on.results and bool(on.results[left.id].tokens))
    on.cancel(left.id)
    on.until(on.ended(left.id, *(each.id for each in others)))
    assert on.results[left.id].finished.reason == "cancelled"
    expected = off.generate(*others)
    assert [on.results[each.id].tokens for each in others] == [result.tokens for result in expected]
    pair.both(ask(next(name), SAID, temperature=1.0))


def test_equal_logits_give_the_token_that_whole_rows_give(tmp_path: Path) -> None:
    """All are equal here, so that every row has to be computed again."""
    write_gguf(tmp_path / "flat.gguf", Shape(scale=0.0))
    with Program(COMMAND) as on, Program(COMMAND) as off:
        on.load(command(tmp_path / "flat.gguf", backend_sampling="on", slots=2))
        off.load(command(tmp_path / "flat.gguf", backend_sampling="off", slots=2))
        found = Pair((on, off)).both(
            ask(next(name), max_tokens=5), *(ask(next(name), temperature=1.0, top_k=7, seed=s) for s in range(3))
        )
    assert found[0].tokens == [0] * 5
    assert found[1].tokens != found[2].tokens


@pytest.mark.parametrize(("tensor", "n_failed"), [("token_embd.weight", 2), ("output.weight", 3)])
def test_logits_that_are_no_numbers_fail_their_requests(tmp_path: Path, tensor: str, n_failed: int) -> None:
    """An embedding spoils the requests that have its token; a row of the output one logit of all of them."""
    write_gguf(tmp_path / "good.gguf", Shape())
    spoil(tmp_path / "good.gguf", tmp_path / "bad.gguf", tensor)
    with Program(COMMAND) as program:
        program.load(command(tmp_path / "bad.gguf", backend_sampling="on", slots=3))
        bad = [ask(next(name), [97, 120, 99]), ask(next(name), [97, 120, 99], temperature=1.0, top_k=5)]
        good = ask(next(name), [97] * 5, temperature=1.0, top_k=2, max_tokens=3)
        results = program.generate(*bad, good)
    assert [result.failed.code for result in results[:n_failed]] == ["engine_error"] * n_failed
    assert [len(result.tokens) for result in results] == [0] * n_failed + [3] * (3 - n_failed)


@pytest.mark.parametrize("slots", [1, 3])
def test_logits_that_are_no_numbers_fail_no_later_request(tmp_path: Path, slots: int) -> None:
    """Without flash attention, cells that are not seen are still computed with."""
    write_gguf(tmp_path / "good.gguf", Shape())
    spoil(tmp_path / "good.gguf", tmp_path / "bad.gguf", "token_embd.weight")
    with Program(COMMAND) as program:
        program.load(command(tmp_path / "bad.gguf", slots=slots, flash_attn="off"))
        for _ in range(slots + 1):
            [bad] = program.generate(ask(next(name), [97, 97, 97, 97, 97, 120, 99]))
            assert bad.failed.code == "engine_error"
            [good] = program.generate(ask(next(name), [97] * 5, max_tokens=3))
            assert len(good.tokens) == 3
        together = [ask(next(name), [97, 97, last], max_tokens=3) for last in range(97, 97 + slots)]
        assert [len(result.tokens) for result in program.generate(*together)] == [3] * slots


@pytest.mark.parametrize("slots", [1, 2])
def test_after_logits_that_are_no_numbers_a_prefix_in_the_hosts_memory_is_served(tmp_path: Path, slots: int) -> None:
    write_gguf(tmp_path / "good.gguf", Shape())
    spoil(tmp_path / "good.gguf", tmp_path / "bad.gguf", "token_embd.weight")
    prompts = [[97 + (seed + at) * (at + 7) % 20 for at in range(400)] for seed in range(slots + 1)]
    with Program(COMMAND) as program:
        program.load(command(tmp_path / "bad.gguf", slots=slots, n_ctx=2048, flash_attn="off"))
        never = {120: -1000.0}
        first = [program.generate(ask(next(name), each, max_tokens=3, logit_bias=never))[0] for each in prompts]
        [bad] = program.generate(ask(next(name), [97, 120, 99]))
        assert bad.failed.code == "engine_error"
        again = program.generate(*(ask(next(name), each, max_tokens=3, logit_bias=never) for each in prompts))
    assert [result.tokens for result in again] == [result.tokens for result in first]


def test_sequences_that_fail_together_fail_no_later_request(tmp_path: Path) -> None:
    write_gguf(tmp_path / "good.gguf", Shape())
    spoil(tmp_path / "good.gguf", tmp_path / "bad.gguf", "token_embd.weight")
    with Program(COMMAND) as program:
        program.load(command(tmp_path / "bad.gguf", slots=3, flash_attn="off"))
        for _ in range(2):
            spoilt = program.generate(*(ask(next(name), [97, 97, 97, last, 120, 99]) for last in range(97, 100)))
            assert [result.failed.code for result in spoilt] == ["engine_error"] * 3
            good = program.generate(*(ask(next(name), [last] * 3, max_tokens=3) for last in range(97, 100)))
            assert [len(result.tokens) for result in good] == [3] * 3


# --- whether it is used ---


def test_it_is_not_used_on_processors_unless_it_is_asked_for(tmp_path: Path) -> None:
    write_gguf(tmp_path / "twin.gguf", Shape())
    for wanted in ("auto", "off"):
        done = load(command(tmp_path / "twin.gguf", backend_sampling=wanted), lambda _: None)
        assert done.sampling.sizes == ()
        done.free()


def test_where_it_cannot_be_it_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="backend_sampling"):
        CudaOptions(path="x.gguf", split_mode="tensor", backend_sampling="on")
    Encoder().write(tmp_path / "encoder.gguf")
    with pytest.raises(LoadError, match=r"backend_sampling: .* encoder"):
        load(command(tmp_path / "encoder.gguf", backend_sampling="on"), lambda _: None)
    write_gguf(tmp_path / "small.gguf", Shape(vocabulary=270))
    load(command(tmp_path / "small.gguf", backend_sampling="on"), lambda _: None).free()


@pytest.mark.parametrize("n_true", [0, 1, 2])
def test_a_token_computed_once_more_is_the_last_one_and_its_cell_is_dropped(n_true: int) -> None:
    """Also where it is one of a draft, after ``n_true`` guesses that came true."""
    cells = RecordedCells(2)
    scheduler = Scheduler(2, 64, 64, 64, Pace(1.0), PrefixCache(cells, 0), Speculation(3, 32))
    stream = Sequence("a", [1, 2, 3, 4, 5, 6, 7, 8] * 3, 24, 24, 60, Sampler(SamplingParams(seed=0)))
    scheduler.add(stream)
    for n_drafted in (0, 3, 3):
        step = scheduler.plan()
        [chunk] = step.chunks
        assert len(chunk.draft) == n_drafted
        cells.decode(step)
        scheduler.computed(step, 0.01)
        stream.tokens += chunk.draft[:n_true]
        if chunk.draft:
            scheduler.verified(chunk)
        scheduler.recompute_last(stream)
        assert cells.held == [slot.cached for slot in scheduler.slots]
        assert stream.n_computed == len(stream.tokens) - 1
    assert len(stream.tokens) == 24 + 2 * n_true
