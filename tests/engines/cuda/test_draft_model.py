"""A draft model beside the model, with llama.cpp: same tokens, fewer steps; float32 weights, which round alike."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Estimate, Generate, Grammar, Load
from exo.worker.protocol.runners import RUNNERS
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.loading.estimate import estimate
from tests.engines.cuda.test_draft import Counting
from tests.support.program import Program, Result, ask, runner_command
from tests.support.rpc_devices import llama_command
from tests.support.tiny import Shape, write_gguf, write_scripted
from tests.support.twins import FLOAT32

PROMPTS = ("once upon a time", "the old man and his dog", "numbers: one two three")


def load(path: Path, backend: str = "LlamaCppCpu", **table: JsonValue) -> Load:
    options: dict[str, JsonValue] = {**FLOAT32, "path": str(path), "n_ctx": 512, "slots": 3, "n_ubatch": 64, **table}
    return Load(model_id="test/tiny", backend=backend, table=options)


@dataclass(slots=True)
class Trio:
    """The same model without drafts, with a draft model that is as good as itself, and with one that is as bad as can
    be."""

    off: Counting
    good: Counting
    bad: Counting

    def all_alike(self, *requests: Generate) -> tuple[list[Result], list[int]]:
        """The results, which are the same in all three, and how many messages each took."""
        results: list[list[Result]] = []
        messages: list[int] = []
        for program in (self.off, self.good, self.bad):
            before = program.n_messages
            results.append(program.generate(*requests))
            messages.append(program.n_messages - before)
            for request in requests:
                del program.results[request.id]
        for others in results[1:]:
            for without, drafting in zip(results[0], others, strict=True):
                assert drafting.tokens == without.tokens
                assert (drafting.text, drafting.pieces) == (without.text, without.pieces)
                assert drafting.finished.reason == without.finished.reason
                assert drafting.finished.usage.completion_tokens == without.finished.usage.completion_tokens
        return results[0], messages


@pytest.fixture(scope="module", params=["llama", "gemma3", "llama on devices"])
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    folder = tmp_path_factory.mktemp("models")
    architecture, _, on_devices = request.param.partition(" ")
    write_gguf(folder / "model.gguf", Shape(architecture))
    write_gguf(folder / "other.gguf", Shape(architecture="llama", seed=5, layers=1))
    backend = "LlamaCppCuda" if on_devices else "LlamaCppCpu"
    command = llama_command(backend)
    with Counting(command) as off, Counting(command) as good, Counting(command) as bad:
        off.load(load(folder / "model.gguf", backend))
        good.load(load(folder / "model.gguf", backend, speculate=6, draft={"path": str(folder / "model.gguf")}))
        bad.load(load(folder / "model.gguf", backend, speculate=6, draft={"path": str(folder / "other.gguf")}))
        yield Trio(off, good, bad)


def test_output_does_not_change_and_takes_few_steps_with_a_good_draft_model(trio: Trio) -> None:
    for prompt in PROMPTS:
        for temperature in (0.0, 0.4, 1.0):
            request = ask("x", prompt, temperature=temperature, seed=3, max_tokens=80)
            _, (without, good, bad) = trio.all_alike(request)
            assert without == 80
            assert good < 20
            assert good < bad <= 80


def test_several_sequences_are_drafted_for_together(trio: Trio) -> None:
    requests = [ask(prompt, prompt, seed=1, temperature=0.7, max_tokens=60) for prompt in PROMPTS]
    together, (without, good, _) = trio.all_alike(*requests)
    for request, result in zip(requests, together, strict=True):
        (alone,), _ = trio.all_alike(request)
        assert result.tokens == alone.tokens
    assert good < without / 3


def test_what_a_request_asks_for_beside_tokens_is_the_same(trio: Trio) -> None:
    """Penalties, biases, log-probabilities, grammars and stop strings."""
    penalties = ask("p", max_tokens=50, frequency_penalty=1.5, repetition_penalty=1.2, logit_bias={40: -5.0})
    trio.all_alike(penalties.model_copy(update={"logprobs": 3}))
    grammar = Grammar(syntax="regex", source="[a-d ]{40}")
    trio.all_alike(ask("g", temperature=0.6, seed=1, max_tokens=60).model_copy(update={"grammar": grammar}))
    (whole,), _ = trio.all_alike(ask("w", max_tokens=20))
    stop = "".join(whole.pieces[8:10])
    (stopped,), _ = trio.all_alike(ask("s", max_tokens=20, stop=[stop]))
    assert stopped.finished.stop == stop


def test_a_prompt_that_the_draft_model_has_not_seen_is_caught_up_with(trio: Trio) -> None:
    """Long ones, ones that go on where others ended, and ones in a slot that had another."""
    for length in (400, 90):
        prompt = [(7 * n) % 250 for n in range(length)]
        (turn,), (without, good, _) = trio.all_alike(ask("turn", prompt, max_tokens=60))
        assert good < without / 2
        (again,), _ = trio.all_alike(ask("again", [*prompt, *turn.tokens, 33, 34], max_tokens=40))
        assert again.finished.usage.cached_tokens >= length
    for length in range(494, 504):
        (full,), _ = trio.all_alike(ask("full", [5] * length, max_tokens=None))
        assert len(full.tokens) == 512 - length


def test_a_replay_goes_on_where_it_was(trio: Trio) -> None:
    request = ask("whole", temperature=0.8, seed=9, max_tokens=60)
    (whole,), _ = trio.all_alike(request)
    replay = request.model_copy(update={"id": "replay", "delivered": tuple(whole.tokens[:37])})
    (rest,), (without, good, _) = trio.all_alike(replay)
    assert rest.tokens == whole.tokens[37:]
    assert good < without


def test_a_cancelled_sequence_leaves_nothing_behind(trio: Trio) -> None:
    expected, _ = trio.all_alike(ask("expected", PROMPTS[1], max_tokens=40))
    for program in (trio.good, trio.bad):
        program.send(ask("leaving", max_tokens=400), ask("staying", PROMPTS[1], max_tokens=40))
        program.until(lambda program=program: len(program.results.get("leaving", Result()).tokens) > 10)
        program.cancel("leaving")
        program.until(program.ended("leaving", "staying"))
        assert program.results["staying"].tokens == expected[0].tokens
        after = program.generate(ask("after", PROMPTS[1], max_tokens=40))
        assert after[0].tokens == expected[0].tokens


# --- what is refused ---


def test_a_draft_model_that_cannot_be_loaded_is_refused_by_its_key(tmp_path: Path) -> None:
    model, broken = tmp_path / "model.gguf", tmp_path / "broken.gguf"
    write_gguf(model, Shape())
    broken.write_bytes(model.read_bytes()[:5000])
    tables: list[tuple[dict[str, JsonValue], str]] = [
        ({"path": str(tmp_path / "missing.gguf")}, r"\[cuda.draft\] path: no model file"),
        ({"repo": "some/repo", "file": "*.gguf"}, r"\[cuda.draft\] file: no model file for some/repo"),
        ({"path": str(broken)}, r"\[cuda.draft\] path: "),
        ({"path": str(model), "max_tokens": 0}, "draft.max_tokens"),
        ({"path": str(model), "threads": 1}, "draft.threads"),
        ({}, "give either path, or repo and file"),
    ]
    for draft, message in tables:
        with pytest.raises(LoadError, match=message):
            estimate(Estimate(load=load(model, draft=draft)))


def test_a_vocabulary_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    model, larger, other = tmp_path / "model.gguf", tmp_path / "larger.gguf", tmp_path / "other.gguf"
    write_gguf(model, Shape())
    write_gguf(larger, Shape(vocabulary=384))
    assert "[cuda.draft] path: it has 384 tokens, the model has 320" in refusal(model, larger)
    write_scripted(other, [" a word"])
    assert "[cuda.draft] path: its token 256 is ' a word', the model's ' t'" in refusal(model, other)


def refusal(model: Path, draft: Path) -> str:
    with Program(runner_command(RUNNERS["cuda"].module)) as program:
        program.send(load(model, draft={"path": str(draft)}))
        assert program.drain() != 0
        assert program.failure is not None
        return program.failure.message


def test_off_asks_for_no_draft_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", Shape())
    with Program(runner_command(RUNNERS["cuda"].module)) as program:
        program.load(load(tmp_path / "model.gguf", speculate="off", draft={"path": str(tmp_path / "missing.gguf")}))


def test_the_ledger_counts_a_draft_model(tmp_path: Path) -> None:
    model, draft = tmp_path / "model.gguf", tmp_path / "draft.gguf"
    write_gguf(model, Shape())
    write_gguf(draft, Shape(layers=3, seed=5))

    def parts(**table: Any) -> dict[str, int]:  # noqa: ANN401 -- of a model card
        return dict(estimate(Estimate(load=load(model, **table))).choices[0].parts)

    without, beside = parts(), parts(draft={"path": str(draft)})
    taken = beside.pop("draft model")
    assert beside == without
    cells = 3 * 512 * 3 * 2 * 2 * 16 * 4  # slots, tokens, layers, keys and values, heads, width, bytes
    assert taken > draft.stat().st_size * 0.9 + cells
    assert parts(draft={"path": str(draft)}, speculate="off") == without
