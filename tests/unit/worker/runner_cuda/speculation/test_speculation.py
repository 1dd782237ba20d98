"""Who makes drafts, how long they are, and what verifying them leaves: with real cells' rules and no library."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from exo.worker.protocol.commands import SamplingParams
from exo.worker.runner_cuda.loading.options import Speculate
from exo.worker.runner_cuda.prefix.cache import PrefixCache
from exo.worker.runner_cuda.prompt_cuts import SCORED_ROWS
from exo.worker.runner_cuda.sampling.sampler import Sampler
from exo.worker.runner_cuda.scheduler import Scheduler
from exo.worker.runner_cuda.sequence import Sequence as Stream
from exo.worker.runner_cuda.speculation.ngram_drafter import LONGEST
from exo.worker.runner_cuda.speculation.speculation import Guesser, Speculation
from exo.worker.runner_cuda.step_time import Pace
from tests.support.cells import RecordedCells

FRESH = [(7919 * n) % 10007 for n in range(2000)]
"""Text in which nothing comes twice."""


def free(rows: int) -> float:
    """Seconds of a step on a machine that computes rows together as fast as one."""
    return 0.01


def dear(rows: int) -> float:
    """The same, where rows cost more together than one by one."""
    return 0.01 if rows == 1 else 0.02 * rows


def processors(rows: int) -> float:
    """As two cores were seen to be: eight rows take four times as long as one, and more rows as much more each."""
    return 0.01 + 0.0045 * (rows - 1)


@dataclass(slots=True)
class Guess:
    """Guesses the next token of ``text`` where it stands, or always the same if it is ``wrong``."""

    text: list[int]
    wrong: bool = False
    longest: int = 8
    seconds: float = 0.001
    behind: int = 0
    """Steps for which it has to catch up."""
    sizes: list[int] = field(default_factory=list[int])

    def catch_up(self, streams: Sequence[Stream]) -> bool:
        self.behind -= 1
        return self.behind < 0

    def draft(self, streams: Sequence[Stream], size: int) -> list[list[int]]:
        self.sizes.append(size)
        return [[-1] * size if self.wrong else self.text[len(s.tokens) : len(s.tokens) + size] for s in streams]


class Machine:
    """A scheduler, cells, and a model that says ``text`` whatever it is asked."""

    def __init__(self, text: list[int], speculate: Speculate, n_slots: int = 2, model: Guesser | None = None) -> None:
        self.text = text
        self.cells = RecordedCells(n_slots)
        speculation = Speculation(speculate, n_slots + SCORED_ROWS, model)
        self.scheduler = Scheduler(n_slots, 64, 64, 64, Pace(1.0), PrefixCache(self.cells, 0), speculation)
        self.n_steps = 0

    def add(self, name: str, n_prompt: int, n_limit: int) -> Stream:
        prompt, sampler = self.text[:n_prompt], Sampler(SamplingParams(seed=0))
        stream = Stream(name, prompt, n_prompt, n_prompt, n_limit, sampler)
        self.scheduler.add(stream)
        return stream

    def step(self, seconds: Callable[[int], float]) -> list[int]:
        """How many tokens each draft had."""
        step = self.scheduler.plan()
        self.n_steps += 1
        self.cells.decode(step)
        self.scheduler.computed(step, seconds(step.n_rows))
        for chunk in step.chunks:
            tokens = chunk.sequence.tokens
            for guessed in [*chunk.draft, None][: chunk.n_sampled]:
                tokens.append(self.text[len(tokens)])
                if len(tokens) == chunk.sequence.n_limit:
                    self.scheduler.remove(chunk.sequence.id)
                    break
                if tokens[-1] != guessed:
                    break
            if chunk.draft:
                self.scheduler.verified(chunk)
        assert self.cells.held == [slot.cached for slot in self.scheduler.slots]
        return [len(chunk.draft) for chunk in step.chunks]

    def run(self, seconds: Callable[[int], float]) -> int:
        """Steps to the end; how many tokens were drafted."""
        n_drafted = 0
        while self.scheduler:
            n_drafted += sum(self.step(seconds))
        return n_drafted


@settings(max_examples=150)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=90), st.sampled_from([1, 3, 16]), st.integers(1, 20))
def test_whatever_is_guessed_the_cells_are_those_of_what_was_said(text: list[int], size: int, n_prompt: int) -> None:
    n_prompt = min(n_prompt, len(text) - 1)
    machine = Machine(text, size)
    stream = machine.add("x", n_prompt, len(text))
    machine.run(free)
    assert stream.tokens == text
    assert all(cells == text[: len(cells)] for cells in machine.cells.held)


def test_repeated_text_takes_few_steps_where_that_pays_and_is_not_guessed_where_it_does_not() -> None:
    text = list(range(50)) * 8
    drafting, not_drafting = Machine(text, "auto"), Machine(text, "auto")
    for machine in (drafting, not_drafting):
        machine.add("x", 50, len(text))
    drafting.run(free)
    assert drafting.n_steps < 80
    assert not_drafting.run(dear) <= 4 * LONGEST  # it had to learn
    assert not_drafting.n_steps > 280


def test_several_sequences_get_drafts_as_long_as_pays_for_all_of_them() -> None:
    """Each as long as the others, and never more rows than may give logits."""
    text = list(range(50)) * 8
    steps: dict[int, int] = {}
    for count in (1, 3, 20):
        machine = Machine(text, "auto", n_slots=20)
        for number in range(count):
            machine.add(str(number), 50, len(text))
        while machine.scheduler:
            sizes = machine.step(free)
            assert len(set(sizes)) <= 1
            assert sum(sizes) + len(sizes) <= 20 + SCORED_ROWS or not any(sizes)
        steps[count] = machine.n_steps
    assert steps[1] <= steps[3] < 100 < steps[20] < 350


def test_at_a_load_where_rows_cost_more_together_there_are_no_drafts() -> None:
    """On a machine with room for eight rows at once, one sequence has drafts, and eight have none."""

    def eight(rows: int) -> float:
        return 0.01 if rows <= 8 else 0.01 * rows

    drafted: dict[int, int] = {}
    for count in (1, 8):
        machine = Machine(list(range(50)) * 8, "auto", n_slots=8)
        for number in range(count):
            machine.add(str(number), 50, 400)
        drafted[count] = machine.run(eight) // count
    assert drafted[1] > 200
    assert drafted[8] <= 2 * LONGEST  # it had to learn


def test_there_is_no_draft_beside_a_prompt() -> None:
    machine = Machine([1, 2, 3] * 2000, 8)
    machine.add("x", 30, 3000)
    assert [machine.step(free) for _ in range(2)] == [[0], [8]]
    machine.add("y", 900, 3000)
    drafted: list[list[int]] = []
    while len(machine.cells.held[1]) < 900:
        drafted.append(machine.step(free))
    assert drafted == [[0]] * len(drafted)
    assert machine.step(free) == [8, 8]


def test_a_hiccup_of_the_machine_does_not_end_drafts() -> None:
    """The first step with a draft, of which nothing was known, took a hundred times as long as it should."""
    text = list(range(50)) * 8
    machine = Machine(text, "auto")
    machine.add("x", 50, len(text))
    hiccups = iter([1.0])

    def seconds(rows: int) -> float:
        return next(hiccups, 0.01) if rows > 1 else 0.01

    machine.step(free)  # the prompt's own
    machine.run(seconds)
    assert next(hiccups, None) is None
    assert machine.n_steps < 90


# --- with a draft model ---


def test_a_model_guesses_what_has_not_been_said_before() -> None:
    model = Guess(FRESH)
    machine = Machine(FRESH, "auto", model=model)
    stream = machine.add("x", 20, 420)
    machine.run(processors)
    assert stream.tokens == FRESH[:420]
    assert machine.n_steps < 200
    without = Machine(FRESH, "auto")
    without.add("x", 20, 420)
    assert without.run(processors) == 0
    assert without.n_steps == 400


def test_a_model_that_guesses_wrong_or_slowly_is_seldom_asked_but_not_never() -> None:
    for model in (Guess(FRESH, wrong=True), Guess(FRESH, seconds=0.02)):
        machine = Machine(FRESH, "auto", model=model)
        machine.add("x", 20, 1020)
        machine.run(processors)
        assert len(model.sizes) < 40
    model = Guess(FRESH, wrong=True)
    machine = Machine(FRESH, "auto", model=model)
    machine.add("x", 20, 1020)
    for _ in range(500):
        machine.step(processors)
    model.wrong = False
    machine.run(processors)
    assert sum(model.sizes[-20:]) > 40
    assert machine.n_steps < 850


def test_repeated_text_is_looked_up_rather_than_asked_of_a_model() -> None:
    text = list(range(50)) * 8
    model = Guess(text)
    machine = Machine(text, "auto", model=model)
    machine.add("x", 150, len(text))
    machine.run(free)
    assert len(model.sizes) < 10
    assert machine.n_steps < 60


def test_a_number_of_tokens_is_kept_to_as_far_as_a_model_guesses() -> None:
    for speculate, longest, expected in ((4, 8, 4), (16, 8, 8)):
        model = Guess(FRESH, longest=longest)
        machine = Machine(FRESH, speculate, model=model)
        machine.add("x", 20, 60)
        machine.run(dear)
        assert max(model.sizes) == expected


def test_nothing_is_drafted_while_a_model_catches_up() -> None:
    model = Guess(FRESH, behind=5)
    machine = Machine(FRESH, 4, model=model)
    machine.add("x", 20, 60)
    assert [sum(machine.step(free)) for _ in range(8)] == [0, 0, 0, 0, 0, 0, 4, 4]


def test_off_is_off() -> None:
    model = Guess(FRESH)
    machine = Machine(FRESH, "off", model=model)
    machine.add("x", 20, 60)
    assert machine.run(free) == 0
    assert model.sizes == []
