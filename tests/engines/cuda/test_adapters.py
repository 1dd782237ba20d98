"""Adapters with llama.cpp: each request has its own, in any company, and the prefix cache keeps them apart."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Estimate, Generate, Load, UsedAdapter
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.loading.estimate import estimate
from tests.support.program import Program, ask, names
from tests.support.rpc_devices import llama_command
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.adapter import RANK, write_gguf_adapter
from tests.support.twins import FLOAT32

NAME = names()
ALL = ("", "one", "two")
Write = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Setup:
    """A model with the adapters "one" and "two" in a folder."""

    folder: Path
    shape: Shape
    backend: str
    running: ExitStack

    def command(self, *, prefixes: str = "", **more: JsonValue) -> Load:
        lora: list[JsonValue] = [{"name": each, "path": str(self.folder / f"{each}.gguf")} for each in ("one", "two")]
        table = {"path": str(self.folder / "tiny.gguf"), "n_ctx": 2048, "slots": 4, "lora": lora, **FLOAT32, **more}
        return Load(model_id="test/tiny", backend=self.backend, table=table, prefixes=prefixes)

    def start(self, *, prefixes: str = "", **more: JsonValue) -> Program:
        program = self.running.enter_context(Program(llama_command(self.backend)))
        program.load(self.command(prefixes=prefixes, **more))
        return program


@pytest.fixture(params=["llama", "gemma3", "llama on devices"])
def setup(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Setup]:
    architecture, _, on_devices = request.param.partition(" ")
    shape = Shape(architecture, sliding_window=24)
    with ExitStack() as running:
        yield _written(tmp_path, shape, "LlamaCppCuda" if on_devices else "LlamaCppCpu", running)


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Setup]:
    with ExitStack() as running:
        yield _written(tmp_path, Shape(), "LlamaCppCpu", running)


def _written(folder: Path, shape: Shape, backend: str, running: ExitStack) -> Setup:
    write_gguf(folder / "tiny.gguf", shape)
    write_gguf_adapter(folder / "one.gguf", shape, 1)
    write_gguf_adapter(folder / "two.gguf", shape, 2)
    return Setup(folder, shape, backend, running)


def asked(adapter: str, prompt: str | list[int] = "once upon a time", max_tokens: int = 16, seed: int = 0) -> Generate:
    """Every other seed samples at temperature 1."""
    request = ask(next(NAME), prompt, max_tokens=max_tokens, seed=seed, temperature=seed % 2)
    return using(request, **({adapter: None} if adapter else {}))


def using(request: Generate, **scales: float | None) -> Generate:
    used = tuple(UsedAdapter(name=name, scale=scale) for name, scale in scales.items())
    return request.model_copy(update={"id": next(NAME), "adapters": used})


def words(seed: int, length: int) -> list[int]:
    return [97 + (seed + index) * (index + 7) % 23 for index in range(length)]


def logprobs(program: Program, adapter: str = "", **scales: float) -> np.ndarray:
    """The log-probability of each token in the first place, with one adapter or with those of ``scales``."""
    request = asked(adapter, max_tokens=1).model_copy(update={"logprobs": 20})
    request = using(request, **scales) if scales else request
    (found,) = program.generate(request)[0].logprobs
    return np.array([each.logprob for each in sorted(found.top, key=lambda each: each.token)])


def test_an_adapter_changes_the_logits_in_proportion_to_its_scale(setup: Setup) -> None:
    """Scale 0 leaves them as they are, and twice the scale is the same as twice the file's alpha."""
    write_gguf_adapter(setup.folder / "two.gguf", setup.shape, 1, alpha=2 * RANK)
    scaled: list[JsonValue] = [
        {"name": name, "path": str(setup.folder / f"{file}.gguf"), "scale": scale}
        for name, file, scale in (("none", "one", 0), ("half", "one", 0.5), ("twice", "one", 2), ("alpha", "two", 1))
    ]
    program = setup.start(lora=scaled)
    base = logprobs(program, "")
    assert np.array_equal(logprobs(program, "none"), base)
    half, twice, alpha = (logprobs(program, name) for name in ("half", "twice", "alpha"))
    np.testing.assert_allclose(twice, alpha, atol=1e-4)
    assert not np.allclose(half, base, atol=0.05)
    assert not np.allclose(twice, half, atol=0.05)


def test_a_request_states_scales_and_uses_several_adapters(setup: Setup) -> None:
    """A scale takes the place of the card's. Two adapters together are one that adds what both add."""
    write_gguf_adapter(setup.folder / "sum.gguf", setup.shape, 1, also=2, alpha=2 * RANK)
    names = {"one": "one", "half": "one", "two": "two", "sum": "sum"}
    cards: list[JsonValue] = [
        {"name": name, "path": str(setup.folder / f"{file}.gguf"), "scale": 0.5 if name == "half" else 1}
        for name, file in names.items()
    ]
    program = setup.start(lora=cards)
    assert np.array_equal(logprobs(program, one=0, two=0), logprobs(program))
    half = logprobs(program, "half")
    for same in (logprobs(program, one=0.5), logprobs(program, half=0.5), logprobs(program, one=0.25, half=0.25)):
        assert np.array_equal(same, half)
    both = logprobs(program, one=1, two=1)
    np.testing.assert_allclose(both, logprobs(program, "sum"), atol=1e-4)
    assert not np.allclose(both, logprobs(program, "one"), atol=0.05)


def test_scales_of_others_change_no_text(setup: Setup) -> None:
    program = setup.start()
    scales: list[dict[str, float]] = [{}, {"one": 1}, {"one": 0.5}, {"one": 1, "two": 0.5}, {"one": 0.5, "two": 1}]
    requests = [using(asked("", words(3, 40), 24), **each) for each in scales]
    alone = [program.generate(each)[0].tokens for each in requests]
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    together = program.generate(*(each.model_copy(update={"id": next(NAME)}) for each in requests * 2))
    assert [result.tokens for result in together] == alone * 2


def test_a_prefix_is_used_again_with_the_same_scales_only(setup: Setup) -> None:
    stem, more = words(4, 500), words(5, 30)
    program = setup.start()

    def cached(prompt: list[int], **scales: float) -> int:
        return program.generate(using(asked("", prompt), **scales))[0].finished.usage.cached_tokens

    others: list[dict[str, float]] = [{"one": 0.5}, {"one": 1, "two": 1}, {"one": 1}, {}]
    equal: list[dict[str, float]] = [{"one": 0.5}, {"two": 1, "one": 1}, {"one": 0}]
    assert [cached(stem, **each) for each in others] == [0] * len(others)
    assert [cached(stem + more, **each) for each in equal] == [len(stem)] * len(equal)


@pytest.mark.parametrize("slots", [1, 4])
def test_a_prefix_is_used_again_with_its_own_adapter_only(setup: Setup, slots: int) -> None:
    """Four slots keep all three in their cells; with one, the states of two are in RAM."""
    stem, more = words(1, 500), words(2, 30)
    fresh = setup.start(slots=slots, prefix_cache_bytes=0)
    expected = [fresh.generate(asked(each, stem + more))[0].tokens for each in ALL]
    program = setup.start(slots=slots)
    for adapter in ALL:
        assert program.generate(asked(adapter, stem))[0].finished.usage.cached_tokens == 0
    for adapter, tokens in zip(ALL, expected, strict=True):
        (result,) = program.generate(asked(adapter, stem + more))
        assert result.tokens == tokens
        assert result.finished.usage.cached_tokens == len(stem)


def test_a_prefix_on_disk_keeps_its_adapter(plain: Setup) -> None:
    prompt, prefixes = words(1, 1300), str(plain.folder / "prefixes")
    program = plain.start(prefixes=prefixes)
    (before,) = program.generate(asked("one", prompt))
    assert program.shutdown() == 0
    again = plain.start(prefixes=prefixes)
    for adapter in ("", "two"):
        assert again.generate(asked(adapter, prompt))[0].finished.usage.cached_tokens == 0
    (after,) = again.generate(asked("one", prompt))
    assert after.finished.usage.cached_tokens == len(prompt) - 1
    assert after.tokens == before.tokens
    other: list[JsonValue] = [{"name": "one", "path": str(plain.folder / "one.gguf"), "scale": 0.5}]
    third = plain.start(prefixes=prefixes, lora=other)
    assert third.generate(asked("one", prompt))[0].finished.usage.cached_tokens == 0


def test_the_plan_counts_the_adapters(plain: Setup) -> None:
    with_both, without = (estimate(Estimate(load=each)) for each in (plain.command(), plain.command(lora=[])))
    files = [gguf.GGUFReader(plain.folder / f"{name}.gguf") for name in ("one", "two")]
    tensors = sum(int(tensor.n_bytes) for file in files for tensor in file.tensors)
    assert with_both.choices[0].parts["adapters"] == tensors
    assert "adapters" not in without.choices[0].parts


def written(tensor: str = "", values: np.ndarray | None = None, kind: str = "lora", **keys: str) -> Write:
    """Writes an adapter with these metadata and at most one tensor."""

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string("adapter.type", kind)
        for key, value in keys.items():
            writer.add_string(f"adapter.{key.replace('_', '.', 1)}", value)
        if values is not None:
            writer.add_tensor(tensor, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


def of_shape(shape: Shape) -> Write:
    return lambda path: write_gguf_adapter(path, shape)


UNFIT: dict[str, Write] = {
    "is not a GGUF file": lambda path: path.write_bytes(b"not a GGUF"),
    "is no adapter (LoRA)": lambda path: write_gguf(path, Shape()),
    "is an adapter of qwen3 models, and this model is llama": of_shape(Shape("qwen3")),
    "the model's is 64x32": of_shape(Shape(hidden=96)),
    "changes 'blk.2.": of_shape(Shape(layers=3)),
    "has adapter.type = 'dora', expected 'lora'": written(kind="dora"),
    "aLoRA": written(alora_invocation_tokens="x"),
    "has adapter.lora.alpha = '8', expected a number": written(lora_alpha="8"),
    "is an adapter without tensors": written(),
    "has only one of the pair of tensors": written("blk.0.attn_v.weight.lora_a", np.ones((4, 64), np.float32)),
    "not one of a pair": written("blk.0.attn_norm.weight", np.ones(64, np.float32)),
    "of tensor type 26": written("blk.0.attn_v.weight.lora_a", np.ones((4, 64), np.int32)),
}


@pytest.mark.parametrize("message", UNFIT)
def test_a_file_that_does_not_fit_is_an_error_that_names_the_adapter(plain: Setup, message: str) -> None:
    path = plain.folder / "one.gguf"
    path.unlink()
    UNFIT[message](path)
    with pytest.raises(LoadError) as caught:
        estimate(Estimate(load=plain.command()))
    assert str(caught.value).startswith("model card, [[cuda.lora]] one: ")
    assert message in str(caught.value)


def test_a_missing_file_and_two_adapters_of_one_name_are_errors(plain: Setup) -> None:
    (plain.folder / "two.gguf").unlink()
    with pytest.raises(LoadError, match=r"\[\[cuda.lora\]\] two: no model file") as caught:
        estimate(Estimate(load=plain.command()))
    assert caught.value.code == "model_not_found"
    twice: list[JsonValue] = [{"name": "one", "path": "one.gguf"}] * 2
    with pytest.raises(LoadError, match="lora has two adapters with the name one"):
        estimate(Estimate(load=plain.command(lora=twice)))
    with pytest.raises(LoadError, match="lora and exact exclude each other"):
        estimate(Estimate(load=plain.command(exact=True, flash_attn="on", cache_type_k="bf16", cache_type_v="bf16")))
