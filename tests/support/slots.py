"""The llama.cpp runner's scheduler and prefix cache over recorded cells."""

from itertools import count

from exo.worker.protocol.commands import SamplingParams
from exo.worker.runner_cuda.cell_pool import CellPool
from exo.worker.runner_cuda.prefix.cache import PrefixCache
from exo.worker.runner_cuda.prefix.moved_cells import MovedCells
from exo.worker.runner_cuda.sampling.sampler import Sampler
from exo.worker.runner_cuda.scheduler import Scheduler
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.step import Step
from exo.worker.runner_cuda.step_time import Pace
from tests.support.cells import RecordedCells


class Slots:
    """A scheduler over recorded cells; each sequence generates the tokens that follow 1000."""

    def __init__(
        self,
        n_slots: int,
        *,
        capacity: int = 0,
        window: int | None = None,
        cuts: bool = True,
        spare: int = 0,
        reuse: int | None = None,
        idle_steps: int | None = None,
    ) -> None:
        """With ``idle_steps``, the slots share a pool."""
        self.cells = RecordedCells(n_slots, window=window, can_cut=cuts, spare=spare)
        pool = None if idle_steps is None else CellPool(self.cells, n_slots, idle_steps)
        moved = None if reuse is None else MovedCells(self.cells, reuse)
        self.cache = PrefixCache(pool or self.cells, capacity, moved=moved)
        self.scheduler = Scheduler(n_slots, 512, 512, 512, Pace(1.0), self.cache, pool=pool)
        self.names = (str(number) for number in count())

    def add(
        self, prompt: list[int], *, scored: bool = False, boundaries: tuple[int, ...] = (), adapter: str = ""
    ) -> Sequence:
        name, sampler = next(self.names), Sampler(SamplingParams(seed=0))
        sequence = Sequence(name, list(prompt), len(prompt), len(prompt), 4000, sampler, boundaries=[*boundaries])
        sequence.adapter = adapter
        sequence.prompt_logprobs = 0 if scored else None
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Step:
        step = self.scheduler.plan()
        self.cells.decode(step)
        self.scheduler.computed(step, 0.01)
        self.scheduler.take_checkpoints(step)
        for chunk in step.chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(1000 + len(chunk.sequence.tokens))
        held = [slot.cached for slot in self.scheduler.slots]
        assert [len(cells) for cells in self.cells.held] == [len(cached) for cached in held]
        return step

    def started(self) -> dict[str, int]:
        """How many tokens each of those that now begin finds computed."""
        return dict(self.step().started)

    def ran(self, prompt: list[int], n_output: int = 1, boundaries: tuple[int, ...] = ()) -> Sequence:
        """A sequence that has come and gone."""
        sequence = self.add(prompt, boundaries=boundaries)
        while len(sequence.tokens) < len(prompt) + n_output:
            self.step()
        self.scheduler.remove(sequence.id)
        return sequence

    def spoil(self, *sequences: Sequence) -> None:
        """Takes a step whose logits are NaN for these sequences and wipes their cells right after it."""
        self.step()
        for sequence in sequences:
            self.cells.spoil(sequence.slot)
        self.scheduler.spoilt(sequences)


def prompt(first: int, length: int) -> list[int]:
    return list(range(first, first + length))
