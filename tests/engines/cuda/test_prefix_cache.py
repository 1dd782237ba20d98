import pytest

from exo.worker.runner_common.sequence import Phase
from exo.worker.runner_cuda.prefix.radix_tree import BLOCK
from tests.support.slots import Slots, prompt

CAPACITY = 1 << 20


def test_a_prompt_computed_before_is_not_computed_again_but_its_last_token_is() -> None:
    slots = Slots(2)
    slots.ran(prompt(0, 100))
    again = slots.add(prompt(0, 100))
    assert slots.started() == {again.id: 99}
    assert slots.cells.copies == []


def test_a_prefix_is_taken_from_a_slot_that_is_busy() -> None:
    slots = Slots(3)
    first = slots.add(prompt(0, 100))
    slots.step()
    others = slots.add(prompt(0, 80) + prompt(500, 20)), slots.add(prompt(0, 90) + prompt(600, 20))
    assert slots.started() == {others[0].id: 80, others[1].id: 90}
    assert slots.cells.copies == [(0, 1), (0, 2)]
    assert first.slot == 0
    slots.step()


def test_a_prefix_is_taken_from_an_idle_slot_that_keeps_it() -> None:
    slots = Slots(2)
    slots.ran(prompt(0, 400))
    short = slots.add([*prompt(0, 100), 7])
    assert slots.started() == {short.id: 100}
    assert (short.slot, len(slots.scheduler.slots[0].cached)) == (1, 400)


def test_two_that_come_together_do_not_compute_the_same_prefix_twice() -> None:
    slots = Slots(4)
    first, second = slots.add([*prompt(0, 700), 1]), slots.add([*prompt(0, 700), 2])
    other = slots.add(prompt(5000, 10))
    assert slots.started() == {first.id: 0, other.id: 0}
    assert slots.started() == {}
    assert slots.started() == {second.id: 700}


def test_one_that_waits_for_another_goes_on_alone_when_that_one_is_cancelled() -> None:
    slots = Slots(2)
    first, second = slots.add(prompt(0, 2000)), slots.add([*prompt(0, 2000), 5])
    slots.step()
    slots.scheduler.remove(first.id)
    assert slots.started() == {second.id: 512}


def test_in_a_pool_a_free_slots_cells_move_to_ram_when_another_sequence_enters() -> None:
    slots = Slots(4, capacity=CAPACITY, idle_steps=0)
    slots.ran(prompt(0, 100))
    slots.ran(prompt(1000, 80))
    assert [len(held) for held in slots.cells.held if held] == [80]
    slots.ran([*prompt(1000, 80), 5])
    assert slots.cells.restored == 0, "a sequence keeps the cells that it begins with"
    again = slots.add([*prompt(0, 100), 5])
    assert slots.started() == {again.id: 100}
    assert slots.cells.restored == 1


@pytest.mark.parametrize("capacity", [0, 80 * 8])
def test_in_a_pool_cells_stay_where_ram_has_no_room_for_them(capacity: int) -> None:
    slots = Slots(4, capacity=capacity, idle_steps=0)
    slots.ran(prompt(0, 100))
    slots.ran(prompt(1000, 80))
    assert [len(held) for held in slots.cells.held] == [100, 80, 0, 0]


def test_in_a_pool_a_large_prefix_in_ram_does_not_give_way_to_cells() -> None:
    slots = Slots(4, capacity=9000, idle_steps=0)
    slots.ran(prompt(0, 150))
    slots.ran(prompt(1000, 100))
    slots.ran(prompt(2000, 20))
    assert [len(held) for held in slots.cells.held] == [0, 100, 20, 0]
    again = slots.add([*prompt(0, 150), 5])
    assert slots.started() == {again.id: 150}


def test_in_a_pool_on_a_gpu_cells_move_after_some_decode_steps_or_before_a_long_prompt() -> None:
    slots = Slots(4, capacity=CAPACITY, idle_steps=8)
    slots.ran(prompt(0, 100))
    slots.ran(prompt(1000, 10), n_output=4)
    slots.ran(prompt(2000, 10), n_output=6)
    assert len(slots.cells.held[0]) == 100
    slots.ran(prompt(3000, 10))
    assert len(slots.cells.held[0]) == 0
    slots.ran(prompt(4000, 200))
    assert sum(len(held) for held in slots.cells.held) == 200


def test_a_sequence_enters_a_slot_beside_those_that_run() -> None:
    slots = Slots(8)
    for first in range(0, 8000, 1000):
        slots.ran(prompt(first, 20))
    slots.ran(prompt(0, 20))
    running = slots.add(prompt(20_000, 10))
    slots.step()
    others = [slots.add(prompt(first, 30)) for first in (1000, 6000, 30_000)]
    slots.step()
    used = sorted([running.slot, *(other.slot for other in others)])
    assert used == list(range(used[0], used[0] + 4))


def test_what_no_slot_holds_any_more_comes_back_from_the_host() -> None:
    slots = Slots(1, capacity=CAPACITY)
    slots.ran(prompt(0, 400))
    slots.ran(prompt(5000, 400))
    back = slots.add([*prompt(0, 350), 9])
    assert slots.started() == {back.id: 350}
    assert slots.cells.restored == 1
    slots.step()


def test_cells_that_are_still_to_be_copied_are_not_overwritten_from_the_host() -> None:
    slots = Slots(2, capacity=CAPACITY)
    for first in (0, 1000, 2000, 1000):
        slots.ran(prompt(first, 400))
    assert [slot.cached[0] for slot in slots.scheduler.slots] == [2000, 1000]
    copied, restored = slots.add([*prompt(1000, 100), 7]), slots.add([*prompt(0, 400), 7])
    assert slots.started() == {copied.id: 100}
    assert slots.started() == {restored.id: 400}
    assert (slots.cells.copies, slots.cells.restored) == ([(1, 0)], 1)
    slots.step()


@pytest.mark.parametrize("n_slots", [1, 2, 4])
def test_after_a_spoilt_sequence_a_request_whose_prefix_is_in_the_hosts_memory_is_computed(n_slots: int) -> None:
    slots = Slots(n_slots, capacity=CAPACITY)
    for first in range(0, 1000 * (n_slots + 1), 1000):
        slots.ran(prompt(first, 400))
    spoilt = slots.add(prompt(50_000, 20))
    slots.spoil(spoilt)
    back, other = slots.add([*prompt(0, 400), 7]), slots.add([*prompt(0, 400), 8])
    for _ in range(10):
        slots.step()
    assert len(back.tokens) > back.n_prompt
    slots.scheduler.remove(back.id)
    for _ in range(10):
        slots.step()
    assert len(other.tokens) > other.n_prompt


def test_a_saved_prefix_waits_for_the_next_decode_where_there_is_one_after_a_wipe() -> None:
    slots = Slots(3, capacity=CAPACITY)
    for first in range(0, 4000, 1000):
        slots.ran(prompt(first, 400))
    running, spoilt = slots.add(prompt(60_000, 20)), slots.add(prompt(50_000, 20))
    slots.spoil(spoilt)
    back = slots.add([*prompt(0, 400), 7])
    assert slots.started() == {}
    assert slots.started() == {back.id: 400}
    assert len(running.tokens) > running.n_prompt


@pytest.mark.parametrize("n_spoilt", [2, 3, 4])
def test_sequences_spoilt_together_leave_no_spoilt_cell(n_spoilt: int) -> None:
    """As ``n`` sequences of one prompt are: no slot may be overwritten with the cells of another spoilt one."""
    slots = Slots(4)
    sequences = [slots.add(prompt(1000 * first, 20)) for first in range(4)]
    slots.spoil(*sequences[:n_spoilt])
    for first in range(n_spoilt):
        slots.add(prompt(70_000 + 1000 * first, 30))
    slots.step()


def test_without_memory_for_it_nothing_is_kept() -> None:
    for capacity in (0, 400):
        slots = Slots(1, capacity=capacity)
        slots.ran(prompt(0, 400))
        slots.ran(prompt(5000, 400))
        back = slots.add(prompt(0, 400))
        assert slots.started() == {back.id: 0}
        assert slots.cache.n_bytes == 0


def test_the_memory_for_prefixes_is_bounded_and_the_latest_are_kept() -> None:
    slots = Slots(1, capacity=100_000)
    for first in range(0, 100_000, 1000):
        slots.ran(prompt(first, 400))
        assert slots.cache.n_bytes <= 100_000
    assert slots.cache.n_bytes > 50_000
    old, late = slots.add(prompt(0, 400)), slots.add(prompt(97_000, 400))
    assert slots.started() == {old.id: 0}
    slots.scheduler.remove(old.id)
    assert slots.started() == {late.id: 399}


def test_a_difference_that_is_followed_by_the_same_tokens_is_told_once() -> None:
    """In whatever place the earlier prompt is: in the slot, or in the host's memory."""
    for others in (), (5000, 9000):
        slots = Slots(1, capacity=CAPACITY)
        slots.ran([*prompt(0, 37), 7, *prompt(100, 1500)])
        for first in others:
            slots.ran(prompt(first, 400))
        changed = slots.add([*prompt(0, 37), 8, 9, *prompt(100, 1500)])
        assert slots.step().diverged == [(changed.id, 37)]
        slots.scheduler.remove(changed.id)
        slots.add([*prompt(0, 37), 10, *prompt(100, 1500)])
        assert slots.step().diverged == []


@pytest.mark.parametrize(
    "new",
    [prompt(0, 700), prompt(0, 400) + prompt(20_000, 600), prompt(20_000, 30) + prompt(100, 300), prompt(20_000, 1000)],
    ids=["more of the same", "another end", "little is the same", "nothing is the same"],
)
def test_other_prompts_do_not_diverge(new: list[int]) -> None:
    slots = Slots(1)
    slots.ran(prompt(0, 600))
    slots.add(new)
    assert slots.step().diverged == []


FORGETFUL = pytest.mark.parametrize(("window", "cuts"), [(16, True), (None, False)], ids=["window", "recurrent"])
"""Models with sliding-window layers, and with recurrent layers."""


@FORGETFUL
def test_a_changed_message_goes_on_from_its_start(window: int | None, cuts: bool) -> None:
    """In the slot, and after other prompts, from the host's memory."""
    for others in (), (5000, 6000, 7000):
        slots = Slots(1, capacity=CAPACITY, window=window, cuts=cuts)
        slots.ran(prompt(0, 1000), n_output=50, boundaries=(40, 703, 990))
        for first in others:
            slots.ran(prompt(first, 400))
        changed = slots.add(prompt(0, 720) + prompt(3000, 200))
        assert slots.started() == {changed.id: 696}
        assert slots.cells.restored == bool(others)


@FORGETFUL
def test_another_reply_to_the_same_prompt_goes_on_from_its_end(window: int | None, cuts: bool) -> None:
    slots = Slots(1, capacity=CAPACITY, window=window, cuts=cuts)
    slots.ran(prompt(0, 1000), n_output=200)
    other = slots.add(prompt(0, 1000) + prompt(3000, 200))
    assert slots.started() == {other.id: 1000}


@pytest.mark.parametrize(("window", "cuts", "expected"), [(16, True, 999), (None, False, 936)])
def test_a_prompt_sent_again_goes_on_near_its_end(window: int | None, cuts: bool, expected: int) -> None:
    """A recurrent state cannot go back by the one token that is always computed."""
    slots = Slots(1, capacity=CAPACITY, window=window, cuts=cuts)
    slots.ran(prompt(0, 1000), n_output=200)
    again = slots.add(prompt(0, 1000))
    assert slots.started() == {again.id: expected}


def test_a_window_within_the_cells_that_are_left_needs_no_checkpoint() -> None:
    slots = Slots(1, window=16, spare=200)
    slots.ran(prompt(0, 1000), n_output=100)
    other = slots.add(prompt(0, 950) + prompt(3000, 100))
    assert slots.started() == {other.id: 950}


@FORGETFUL
def test_what_is_not_kept_is_computed_again(window: int | None, cuts: bool) -> None:
    slots = Slots(1, window=window, cuts=cuts)
    slots.ran(prompt(0, 1000), n_output=100)
    other = slots.add(prompt(0, 950) + prompt(3000, 100))
    assert slots.started() == {other.id: 0}
    slots.step()


@FORGETFUL
def test_one_that_waits_for_a_prefix_has_it_kept_although_the_other_goes_on(window: int | None, cuts: bool) -> None:
    slots = Slots(2, capacity=CAPACITY, window=window, cuts=cuts)
    first, second = slots.add(prompt(0, 2000)), slots.add(prompt(0, 1300) + prompt(9000, 100))
    started: dict[str, int] = {}
    while second.id not in started:
        started |= slots.started()
    assert started == {first.id: 0, second.id: 1296}
    assert first.n_computed == 1296 or first.phase is Phase.PREFILL


@FORGETFUL
def test_a_long_prompt_can_be_left_at_many_places(window: int | None, cuts: bool) -> None:
    slots = Slots(1, capacity=1 << 24, window=window, cuts=cuts)
    slots.ran(prompt(0, 20_000), boundaries=(5000, 7500))
    for at, expected in ((19_000, 15_688), (15_600, 11_592), (8000, 7496), (7400, 4096), (4000, 0)):
        other = slots.add(prompt(0, at) + prompt(50_000, 100))
        assert slots.started() == {other.id: expected}
        slots.scheduler.remove(other.id)


def test_a_long_prefix_outlasts_many_short_ones() -> None:
    slots = Slots(1, capacity=250_000)
    slots.ran(prompt(0, 2000))
    for first in range(10_000, 60_000, 1000):
        slots.ran(prompt(first, 300))
    back = slots.add(prompt(0, 2000))
    assert slots.started() == {back.id: 1999}


def test_a_long_state_is_not_copied_for_the_few_tokens_that_a_changed_tail_loses() -> None:
    slots = Slots(1, capacity=CAPACITY)
    slots.ran(prompt(0, 6400), n_output=1)
    few = slots.add(prompt(0, 6100) + prompt(9000, 20))
    assert slots.started() == {few.id: 6100}
    assert slots.cache.n_bytes == 0
    slots.scheduler.remove(few.id)
    slots.add(prompt(0, 5000) + prompt(9500, 20))
    slots.step()
    assert slots.cache.n_bytes > 0


def test_a_prompt_that_is_to_be_scored_is_computed_anew() -> None:
    slots = Slots(2)
    slots.ran(prompt(0, 100))
    scored = slots.add(prompt(0, 100), scored=True)
    assert slots.started() == {scored.id: 0}


def test_a_few_tokens_in_common_are_not_worth_a_copy() -> None:
    slots = Slots(2)
    slots.add(prompt(0, 100))
    slots.step()
    other = slots.add([*prompt(0, BLOCK - 1), 7])
    assert slots.started() == {other.id: 0}
    assert slots.cells.copies == []


def test_what_follows_a_changed_line_is_computed_once_if_it_may_be_moved() -> None:
    slots = Slots(1, reuse=32)
    slots.ran([*prompt(0, 20), 7, *prompt(1000, 900)])
    again = slots.add([*prompt(0, 20), 8, 9, *prompt(1000, 900), 5])
    assert slots.started() == {again.id: 920}
    assert slots.step().n_rows == 1
