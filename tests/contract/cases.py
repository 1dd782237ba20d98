"""Each runner as the contract starts it. A runner joins by one line in CASES."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Generate, Grammar, Load
from exo.worker.protocol.runners import RUNNERS
from tests.conftest import needs_vllm
from tests.support import fake_runner
from tests.support.program import Program, Result, ask, names, runner_command
from tests.support.rpc_devices import llama_command
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.tiny.adapter import write_gguf_adapter, write_peft_adapter
from tests.support.twins import FLOAT32

Table = dict[str, JsonValue]


LLAMA_BACKEND = os.environ.get("EXO_TEST_LLAMA_BACKEND", "LlamaCppCpu")
"""The llama.cpp runner's: ``scripts/gpu_check`` sets it to LlamaCppCuda on a machine with a GPU."""


ADAPTERS = ("one", "two")
TWIN = Shape(head_dim=64)
"""Heads of the smallest size that vLLM has attention for."""


def gguf_table(folder: Path) -> Table:
    """A tiny float32 model, and a context that rounds as little as llama.cpp can."""
    path = folder / "tiny.gguf"
    if not path.exists():
        write_gguf(path, TWIN)
    return {**FLOAT32, "path": str(path)}


def pool_table(folder: Path) -> Table:
    return {**gguf_table(folder), "kv": "pool"}


def mlx_table(folder: Path) -> Table:
    """The same weights."""
    path = folder / "tiny"
    if not path.exists():
        write_mlx(path, TWIN)
    return {"path": str(path), "dtype": "float32"}


def vllm_table(folder: Path) -> Table:
    """The same folder."""
    return {**mlx_table(folder), "threads": 1}


def gguf_adapters(folder: Path) -> list[JsonValue]:
    return _adapters(folder, lambda path, seed: write_gguf_adapter(path.with_suffix(".gguf"), TWIN, seed), ".gguf")


def peft_adapters(folder: Path) -> list[JsonValue]:
    """The same matrices."""
    return _adapters(folder, lambda path, seed: write_peft_adapter(path, TWIN, seed))


def _adapters(folder: Path, write: Callable[[Path, int], None], suffix: str = "") -> list[JsonValue]:
    for seed, each in enumerate(ADAPTERS, 1):
        write(folder / each, seed)
    return [{"name": each, "path": str(folder / each) + suffix} for each in ADAPTERS]


name = names()


@dataclass(frozen=True, slots=True)
class Case:
    """How to start a runner and what its card's table says. ``samples`` if it has a model to sample from."""

    command: tuple[str, ...]
    backend: str
    table: Callable[[Path], Table]
    samples: bool = True
    slow: Table = field(default_factory=dict[str, JsonValue])
    """What makes it slow enough for a test to step in between two tokens, where it is not slow by itself."""
    small_chunks: Table = field(default_factory=lambda: {"n_batch": 32, "n_ubatch": 32})
    """What makes it compute a prompt in many steps."""
    free_threads: Table = field(default_factory=dict[str, JsonValue])
    """What leaves the number of its threads open."""
    cache_block: int = 1
    """Tokens that its prefix cache reuses together or not at all."""
    tasks: tuple[str, ...] = ()
    """As the card has them, where the runner must know."""
    adapters: Callable[[Path], list[JsonValue]] | None = None
    """Writes the adapters "one" and "two" of its model, and returns them as the card's table names them."""


CASES = {
    "fake": Case(
        fake_runner.COMMAND,
        "LlamaCppCpu",
        lambda _: {},
        samples=False,
        slow={"step_seconds": 0.01},
        small_chunks={"chunk": 32},
    ),
    "cuda": Case(
        tuple(runner_command(RUNNERS["cuda"].module)),
        LLAMA_BACKEND,
        gguf_table,
        free_threads={"threads": None},
        adapters=gguf_adapters,
    ),
    "pool": Case(tuple(runner_command(RUNNERS["cuda"].module)), LLAMA_BACKEND, pool_table, adapters=gguf_adapters),
    "rpc": Case(llama_command("LlamaCppCuda"), "LlamaCppCuda", gguf_table, adapters=gguf_adapters),
    "mlx": Case(
        tuple(runner_command(RUNNERS["mlx"].module)),
        "MlxCpu",
        mlx_table,
        small_chunks={"prefill_chunk": 32},
        adapters=peft_adapters,
    ),
    "vllm": Case(
        RUNNERS["vllm"].command,
        "Vllm",
        vllm_table,
        small_chunks={"max_num_batched_tokens": 32},
        cache_block=32,
        adapters=peft_adapters,
    ),
}


EVERY_RUNNER = [pytest.param(name, marks=needs_vllm) if name == "vllm" else name for name in CASES]


ADAPTED = [each for each, case in zip(EVERY_RUNNER, CASES.values(), strict=True) if case.adapters is not None]


SAMPLING = [each for each, case in zip(EVERY_RUNNER, CASES.values(), strict=True) if case.samples]


@dataclass(frozen=True, slots=True)
class Start:
    """Starts runners of one kind and ends them with the test."""

    case: Case
    folder: Path
    running: list[Program]

    def load_command(self, **table: JsonValue) -> Load:
        own = self.case.table(self.folder)
        return Load(model_id="test/tiny", backend=self.case.backend, table={**own, **table}, tasks=self.case.tasks)

    def bare(self) -> Program:
        program = Program(self.case.command).__enter__()
        self.running.append(program)
        return program

    def loaded(self, **table: JsonValue) -> Program:
        program = self.bare()
        program.load(self.load_command(**table))
        return program

    def slow(self, **table: JsonValue) -> Program:
        return self.loaded(**{**self.case.slow, **table})


@dataclass(frozen=True, slots=True)
class Shared:
    """Loaded runners, each started once for all tests that leave it as they found it."""

    folder: Path
    running: dict[str, Program] = field(default_factory=dict[str, Program])

    def program(self, case: Case) -> Program:
        return self._loaded(case, slots=16, n_ctx=512)

    def adapted(self, case: Case) -> Program:
        """With adapters, if the runner has any."""
        lora: Table = {} if case.adapters is None else {"lora": case.adapters(self.folder)}
        return self._loaded(case, slots=4, n_ctx=1024, **lora)

    def slow(self, case: Case) -> Program:
        return self._loaded(case, slots=2, n_ctx=8192, **case.slow, **case.small_chunks)

    def _loaded(self, case: Case, **table: JsonValue) -> Program:
        """A runner that has ended, which fails the test that ended it, is started again for the next one."""
        start = Start(case, self.folder, [])
        key = start.load_command(**table).model_dump_json()
        if key not in self.running or self.running[key].process.poll() is not None:
            self.running[key] = start.loaded(**table)
        return self.running[key]

    def stop(self) -> None:
        for program in self.running.values():
            program.__exit__(None, None, None)


def one(program: Program, request: Generate) -> Result:
    return program.generate(request)[0]


def twins_choose(shared: Shared, requests: Sequence[Generate]) -> list[list[list[int]]]:
    """The tokens of each request, from each runner that is there and has a model to sample from."""
    found: list[list[list[int]]] = []
    for case in (case for case in CASES.values() if case.samples and Path(case.command[0]).exists()):
        again = [each.model_copy(update={"id": next(name)}) for each in requests]
        found.append([result.tokens for result in shared.program(case).generate(*again)])
    return found


def long_prompt(tokens: int) -> list[int]:
    return [97 + index * index % 23 for index in range(tokens)]


def goes_on_from_everywhere(program: Program, request: Generate) -> Result:
    """What a replay relies on: cut after any number of tokens, the rest follows as if nothing had happened."""
    (whole,) = program.generate(request)
    assert len(whole.pieces) == len(whole.tokens)
    cuts = range(len(whole.tokens) + 1)
    continued = [request.model_copy(update={"id": next(name), "delivered": tuple(whole.tokens[:cut])}) for cut in cuts]
    for cut, rest in zip(cuts, program.generate(*continued), strict=True):
        assert whole.tokens[:cut] + rest.tokens == whole.tokens, cut
        assert "".join(whole.pieces[:cut]) + rest.text == whole.text, cut
        assert (rest.finished.reason, rest.finished.stop) == (whole.finished.reason, whole.finished.stop), cut
        usage, undisturbed = rest.finished.usage, whole.finished.usage
        assert usage.prompt_tokens == undisturbed.prompt_tokens, cut
        assert usage.completion_tokens == undisturbed.completion_tokens, cut
        assert usage.cached_tokens <= usage.prompt_tokens, cut
        assert rest.prefill[0].total == usage.prompt_tokens + cut
        assert rest.after_end == []
    return whole


def constrained(grammar: Grammar, **others: object) -> Generate:
    """A request that the grammar has finished before its 200 tokens are spent."""
    request = ask(next(name), max_tokens=200)
    sampling = request.sampling.model_copy(
        update={key: others.pop(key) for key in ("temperature", "seed") & others.keys()}
    )
    return request.model_copy(update={"grammar": grammar, "sampling": sampling, **others})


REGEX = Grammar(syntax="regex", source="(yes|no), [0-9]{3}[a-f]{2,6}")
