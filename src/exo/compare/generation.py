"""Has each engine continue the prompts, and measures its speed and memory. Drives the runner by its protocol."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import ModuleType

import anyio
import psutil
from anyio.abc import TaskGroup

from exo.compare.comparison import MODES, CompareError, MemoryUse, Mode, Speed
from exo.compare.engine import ComparedEngine
from exo.compare.scoring import Tokens
from exo.worker.protocol.commands import Generate, SamplingParams
from exo.worker.protocol.events import Delta, Failed, Finished, PrefillProgress, PromptLogprobs
from exo.worker.supervisor.nvml import query_nvml
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.runner_process import RunnerProcess

_SAMPLE_SECONDS = 0.1

Texts = Mapping[Mode, tuple[Tokens, ...]]
"""The generated tokens, by mode and prompt."""


@dataclass(frozen=True, slots=True)
class Continuations:
    """Prompts to continue by ``tokens`` each. The first has ``seed``, each next one a seed that is one more."""

    prompts: tuple[Tokens, ...]
    tokens: int
    seed: int

    def request(self, mode: Mode, prompt: int) -> Generate:
        """The request for a prompt. It rules out end-of-generation tokens, so that all sequences are equally long."""
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
        """Distinct seeds, so that the prompts do not draw the same numbers."""
        return (self.seed + prompt) % (1 << 64)


@dataclass(frozen=True, slots=True)
class Generated:
    texts: Texts
    """The tokens that follow the engine's own choices."""
    choices: Texts
    """The tokens that follow the reference's choices. Those of the reference are its texts."""
    speed: Speed
    memory: MemoryUse


@dataclass(frozen=True, slots=True)
class _Run:
    """One request, with the times when its events were read."""

    tokens: Tokens
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float


async def generate(
    engine: ComparedEngine, wanted: Continuations, reference: Generated | None, log: Path, note: Callable[[str], None]
) -> Generated:
    """Loads the model and continues every prompt, first greedily, then with a seed, one at a time.

    Without ``reference`` the engine is the reference. Raises CompareError.
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
    """A loaded engine. Its methods raise RunnerError."""

    process: RunnerProcess
    wanted: Continuations
    note: Callable[[str], None]

    async def generate(self, tasks: TaskGroup, reference: Generated | None) -> Generated:
        """Loads the model and generates. Memory is sampled in ``tasks``."""
        self.note("loading")
        await self.process.ready()
        memory = _MemoryWatch()
        tasks.start_soon(memory.watch)
        await self._warm_up()
        runs: dict[Mode, list[_Run]] = {mode: await self._runs(mode) for mode in MODES}
        texts: Texts = {mode: tuple(run.tokens for run in runs[mode]) for mode in MODES}
        # After all timed runs, because a cancelled request may take part in one more step.
        choices: Texts = texts
        if reference is not None:
            choices = {mode: await self._choices(mode, texts[mode], reference.texts[mode]) for mode in MODES}
        return Generated(texts, choices, _speed(runs["greedy"], runs["seeded"]), memory.use())

    async def _warm_up(self) -> None:
        """The first request may compile kernels. Its prompt is reversed, so that it fills no prefix cache."""
        backwards = {"id": "warm-up", "prompt": tuple(reversed(self.wanted.prompts[0]))}
        await _run(self.process, self.wanted.request("greedy", 0).model_copy(update=backwards))

    async def _runs(self, mode: Mode) -> list[_Run]:
        runs: list[_Run] = []
        for prompt in range(len(self.wanted.prompts)):
            self.note(f"{mode} text {prompt + 1} of {len(self.wanted.prompts)}")
            runs.append(await _run(self.process, self.wanted.request(mode, prompt)))
        return runs

    async def _choices(self, mode: Mode, own: tuple[Tokens, ...], reference: tuple[Tokens, ...]) -> tuple[Tokens, ...]:
        """The engine's choice at every position of the reference's texts. ``own`` are its own texts."""
        found: list[Tokens] = []
        for prompt, (mine, text) in enumerate(zip(own, reference, strict=True)):
            self.note(f"{mode} choices along the reference's text {prompt + 1} of {len(reference)}")
            found.append(await _along(self.process, self.wanted.request(mode, prompt), mine, text))
        return tuple(found)


class _MemoryWatch:
    """Samples the memory of this process's children: only one runner runs at a time. Create it when that is ready."""

    def __init__(self) -> None:
        self._ready = self._peak = _resident()
        self._on_devices = [_on_devices()]

    async def watch(self) -> None:
        while True:
            await anyio.sleep(_SAMPLE_SECONDS)
            self._peak = max(self._peak, _resident())

    def use(self) -> MemoryUse:
        """The memory so far. An engine does not return the memory of devices, so the driver is asked only here."""
        sizes = [size for size in (*self._on_devices, _on_devices()) if size is not None]
        return MemoryUse(resident_ready=self._ready, resident_peak=self._peak, device_peak=max(sizes, default=None))


def _resident() -> int:
    size = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            size += process.memory_info().rss
    return size


def _on_devices() -> int | None:
    """Bytes on all NVIDIA devices. None without a driver, or if it does not know our processes, as in a container."""
    ours = {process.pid for process in psutil.Process().children(recursive=True)}

    def query(nvml: ModuleType) -> list[int]:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        found = [each for handle in handles for each in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
        return [each.usedGpuMemory for each in found if each.pid in ours and each.usedGpuMemory is not None]

    nothing: list[int] = []
    sizes = query_nvml(query, nothing)
    return sum(sizes) if sizes else None


async def _along(process: RunnerProcess, request: Generate, own: Tokens, text: Tokens) -> Tokens:
    """The choices along one text.

    After each difference, another request continues from the reference's token, as a replay does. Random numbers are
    keyed by position, so only the preceding text differs. Raises RunnerError.
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
    """The tokens that equal ``text``, and the first one that differs."""
    differs = next((at for at, (one, two) in enumerate(zip(tokens, text, strict=False)) if one != two), len(tokens))
    return tokens[: differs + 1]


def _check_length(request: Generate, tokens: Sequence[int], end: Finished) -> None:
    """Raises RunnerError if a request ended before it had all its tokens."""
    if len(tokens) != request.max_tokens:
        message = f"{request.id} ended ({end.reason}) after {len(tokens)} of {request.max_tokens} tokens"
        raise RunnerError(Failed(id=request.id, code="engine_error", message=message))


async def _run(process: RunnerProcess, request: Generate) -> _Run:
    """Runs one request. Raises RunnerError."""
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
    """Counts the prefill of greedy runs only, because the seeded ones find their prompts in the prefix cache."""
    return Speed(
        prefill_tokens=sum(run.prefill_tokens for run in greedy),
        prefill_seconds=sum(run.prefill_seconds for run in greedy),
        decode_tokens=sum(run.decode_tokens for run in (*greedy, *seeded)),
        decode_seconds=sum(run.decode_seconds for run in (*greedy, *seeded)),
    )
