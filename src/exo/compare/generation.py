"""What each engine makes of given prompts, at which speed and in how much memory: its program under the contract."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import anyio
from anyio.abc import TaskGroup

from exo.compare.comparison import MODES, CompareError, MemoryUse, Mode, Speed
from exo.compare.engine import Engine
from exo.compare.memory import MemoryWatch
from exo.compare.scoring import Tokens
from exo.worker.protocol.messages import (
    Delta,
    Failed,
    Finished,
    Generate,
    PrefillProgress,
    PromptLogprobs,
    SamplingParams,
)
from exo.worker.supervisor.runner_process import RunnerError, RunnerProcess

Texts = Mapping[Mode, tuple[Tokens, ...]]
"""What was generated, by mode and prompt."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Token ids to continue, each by ``tokens`` more; the first is seeded with ``seed``, the next with one more."""

    prompts: tuple[Tokens, ...]
    tokens: int
    seed: int

    def request(self, mode: Mode, prompt: int) -> Generate:
        """End-of-generation tokens are ruled out, so that all sequences are equally long."""
        sampling = SamplingParams(temperature=0 if mode == "greedy" else 1, seed=self.seed_of(prompt))
        return Generate(
            id=f"{mode}-{prompt}",
            prompt=self.prompts[prompt],
            sampling=sampling,
            max_tokens=self.tokens,
            ignore_eos=True,
            exact=True,
        )

    def seed_of(self, prompt: int) -> int:
        """Distinct, so that the prompts do not all draw the same numbers."""
        return (self.seed + prompt) % (1 << 64)


@dataclass(frozen=True, slots=True)
class Generated:
    """What an engine made of every prompt, and what that cost."""

    texts: Texts
    """Each token from what the engine itself chose before it."""
    choices: Texts
    """Each token from what the reference chose before it; the reference's own choices are its texts."""
    speed: Speed
    memory: MemoryUse


@dataclass(frozen=True, slots=True)
class _Run:
    """One request. Seconds are by this process's clock, when the event was read."""

    tokens: Tokens
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float


async def generate(
    engine: Engine, wanted: Wanted, reference: Generated | None, log: Path, note: Callable[[str], None]
) -> Generated:
    """Loads the model and runs every prompt greedily, then seeded, one at a time.

    Without a ``reference`` the engine is the reference. Raises CompareError.
    """
    process = RunnerProcess(engine.command, engine.load, log)
    outcome: Generated | Failed = Failed(code="shutdown", message="the runner was shut down")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(process.run)
        try:
            session = _Session(process, wanted, lambda text: note(f"engine {engine.name}: {text}"))
            outcome = await session.generate(tasks, reference)
        except RunnerError as error:
            outcome = error.failed
        finally:
            with anyio.CancelScope(shield=True):
                await process.close()
            tasks.cancel_scope.cancel()  # the watch
    if isinstance(outcome, Failed):
        raise CompareError(f"engine {engine.name}: {outcome.message}")
    return outcome


@dataclass(frozen=True, slots=True)
class _Session:
    """One engine at work. What it does raises RunnerError."""

    process: RunnerProcess
    wanted: Wanted
    note: Callable[[str], None]

    async def generate(self, tasks: TaskGroup, reference: Generated | None) -> Generated:
        """Everything, from loading on; memory is watched in ``tasks``."""
        self.note("loading")
        await self.process.ready()
        memory = MemoryWatch()
        tasks.start_soon(memory.watch)
        await self._warm_up()
        runs: dict[Mode, list[_Run]] = {mode: await self._runs(mode) for mode in MODES}
        texts: Texts = {mode: tuple(run.tokens for run in runs[mode]) for mode in MODES}
        # After all timed runs: what is cancelled here may still take part in the runner's next step.
        choices: Texts = texts
        if reference is not None:
            choices = {mode: await self._choices(mode, texts[mode], reference.texts[mode]) for mode in MODES}
        return Generated(texts, choices, _speed(runs["greedy"], runs["seeded"]), memory.use())

    async def _warm_up(self) -> None:
        """A first request may pay for kernels. The prompt is backwards, so that no prefix cache gains by it."""
        backwards = {"id": "warm-up", "prompt": tuple(reversed(self.wanted.prompts[0]))}
        await _run(self.process, self.wanted.request("greedy", 0).model_copy(update=backwards))

    async def _runs(self, mode: Mode) -> list[_Run]:
        runs: list[_Run] = []
        for prompt in range(len(self.wanted.prompts)):
            self.note(f"{mode} text {prompt + 1} of {len(self.wanted.prompts)}")
            runs.append(await _run(self.process, self.wanted.request(mode, prompt)))
        return runs

    async def _choices(self, mode: Mode, own: tuple[Tokens, ...], reference: tuple[Tokens, ...]) -> tuple[Tokens, ...]:
        """What the engine chooses at every position of the reference's texts; ``own`` is what it wrote by itself."""
        found: list[Tokens] = []
        for prompt, (mine, text) in enumerate(zip(own, reference, strict=True)):
            self.note(f"{mode} choices along the reference's text {prompt + 1} of {len(reference)}")
            found.append(await _along(self.process, self.wanted.request(mode, prompt), mine, text))
        return tuple(found)


async def _along(process: RunnerProcess, request: Generate, own: Tokens, text: Tokens) -> Tokens:
    """The choices along one text.

    After each difference another request goes on from the reference's token, as a replay would: randomness is keyed by
    position, so nothing but what was read changes. Raises RunnerError.
    """
    chosen = _to_difference(own, text)
    while len(chosen) < len(text):
        left = {"prompt": (*request.prompt, *text[: len(chosen)]), "max_tokens": len(text) - len(chosen)}
        rest = request.model_copy(update={"id": f"{request.id}-from-{len(chosen)}", **left})
        chosen += await _follow(process, rest, text[len(chosen) :])
    return chosen


async def _follow(process: RunnerProcess, request: Generate, text: Tokens) -> Tokens:
    """The engine's tokens up to the first that differs from ``text``, which ends the request. Raises RunnerError."""
    tokens: Tokens = ()
    async with process.generate(request) as events:
        async for event in events:
            match event:
                case Delta():
                    tokens = _to_difference((*tokens, *event.tokens), text)
                    if tokens != text[: len(tokens)]:
                        break
                case Finished():
                    _check_length(request, tokens, event)
                case Failed():
                    raise RunnerError(event)
                case PrefillProgress() | PromptLogprobs():
                    pass
    return tokens


def _to_difference(tokens: Tokens, text: Tokens) -> Tokens:
    """What is the same as in ``text``, and the first token that is not."""
    differs = next((at for at, (one, two) in enumerate(zip(tokens, text, strict=False)) if one != two), len(tokens))
    return tokens[: differs + 1]


def _check_length(request: Generate, tokens: Sequence[int], end: Finished) -> None:
    """Raises RunnerError for a request that ended before it had all its tokens."""
    if len(tokens) != request.max_tokens:
        message = f"{request.id} ended ({end.reason}) after {len(tokens)} of {request.max_tokens} tokens"
        raise RunnerError(Failed(id=request.id, code="engine_error", message=message))


async def _run(process: RunnerProcess, request: Generate) -> _Run:
    """One request from sending it to its end. Raises RunnerError."""
    tokens: list[int] = []
    sent = perf_counter()
    first = last = sent
    at_first = 0
    async with process.generate(request) as events:
        async for event in events:
            match event:
                case Delta():
                    last = perf_counter()
                    tokens += event.tokens
                    if not at_first:
                        first, at_first = last, len(tokens)
                case Finished():
                    _check_length(request, tokens, event)
                    computed = event.usage.prompt_tokens - event.usage.cached_tokens
                    return _Run(tuple(tokens), computed, first - sent, len(tokens) - at_first, last - first)
                case Failed():
                    raise RunnerError(event)
                case PrefillProgress() | PromptLogprobs():
                    pass
    raise AssertionError("events end with a terminal one")


def _speed(greedy: Sequence[_Run], seeded: Sequence[_Run]) -> Speed:
    """Prefill of the greedy runs only: the seeded ones find their prompts in the prefix cache."""
    return Speed(
        prefill_tokens=sum(run.prefill_tokens for run in greedy),
        prefill_seconds=sum(run.prefill_seconds for run in greedy),
        decode_tokens=sum(run.decode_tokens for run in (*greedy, *seeded)),
        decode_seconds=sum(run.decode_seconds for run in (*greedy, *seeded)),
    )
