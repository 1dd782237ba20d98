"""What a plan says of the context: how long it is, and what limits it."""

import pytest

from exo.worker.protocol.events import Estimated, Layout
from exo.worker.runner_common.memory_plan import Open, Part, Plan, estimated
from exo.worker.supervisor.dry_run import decided
from exo.worker.supervisor.memory.budget import MemoryBudget
from exo.worker.supervisor.memory.memory import Memory
from exo.worker.supervisor.placement_plan import PlacementPlan

TRAINED = 131_072


def size(plan: Plan) -> list[Part]:
    """One byte for each token and part, half of that if quantised."""
    return [Part("KV cache", 1, devices={"CUDA0": plan.parts * plan.n_ctx // (2 if plan.cache_type else 1)})]


def layout(plan: Plan) -> Layout:
    return Layout(
        context_length=plan.n_ctx,
        slots=plan.slots,
        kv="pool" if plan.pool else "split",
        kv_type=plan.cache_type or "f16",
        layers={"CUDA0": 9},
        batch=512,
    )


def planned(found: Estimated, device: int, ram: int = 10) -> PlacementPlan:
    room = Memory(ram, {"CUDA0": device})
    budget = MemoryBudget(room)
    budget.enter("it", 0)
    budget.estimate("it", found)
    return PlacementPlan.of(found, budget.settle(0).granted["it"], budget, room)


def choices(**left: object) -> Estimated:
    given = {"n_ctx": True, "slots": True, "trained": TRAINED, **left}
    return estimated(Plan(TRAINED, 2), Open(**given), size, ["q8_0"], layout)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("device", "context_length", "slots", "limit"),
    [
        (2 * TRAINED, TRAINED, 2, "the trained length"),
        (TRAINED, TRAINED, 1, "the trained length"),
        (TRAINED - 1, 114_688, 1, 'CUDA0 is full; with "q8_0" for cache_type_k and cache_type_v 131,072'),
        (60_000, 58_624, 1, 'CUDA0 is full; with "q8_0" for cache_type_k and cache_type_v 114,688'),
    ],
)
def test_the_full_device_and_a_smaller_cache_are_named(
    device: int, context_length: int, slots: int, limit: str
) -> None:
    plan = planned(choices(), device)
    assert (plan.context_length, plan.slots, plan.limit) == (context_length, slots, limit)
    assert (plan.trained_length, plan.kv_type, plan.layers, plan.batch) == (TRAINED, "f16", {"CUDA0": 9}, 512)
    assert plan.memory == {"memory": 1, "CUDA0": slots * context_length}
    assert plan.settings == {"n_ctx": context_length, "slots": slots}


def test_a_pool_is_told_by_its_tokens_and_slots() -> None:
    plan = planned(choices(pool=True), 62_000)
    assert plan.cache == "pool of 58,624 tokens for 2 slots"
    assert plan.settings == {"n_ctx": 58_624, "slots": 2, "kv": "pool"}
    assert plan.limit == 'CUDA0 is full; with "q8_0" for cache_type_k and cache_type_v 114,688'
    whole = planned(choices(pool=True), 2 * TRAINED)
    assert (whole.cache, whole.kv_reason) == ("2 of 131,072 tokens", "")


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (TRAINED, '2 slots of 131,072 tokens do not fit; with kv "split" 2 of 58,624 would'),
        (62_000, "2 slots of 58,624 tokens do not fit"),
    ],
)
def test_a_plan_with_a_pool_says_why_and_what_a_split_cache_would_hold(device: int, reason: str) -> None:
    assert planned(choices(pool=True), device).kv_reason == reason


def test_a_forced_model_has_the_plan_with_which_it_is_loaded_and_a_note() -> None:
    found, room = choices(n_ctx=False, slots=False), Memory(10, {"CUDA0": TRAINED})
    refused = decided("test/large", "cuda", found, room)
    assert refused.problem is not None
    plan = decided("test/large", "cuda", found, room, forced=True)
    assert (plan.problem, plan.context_length, plan.memory["CUDA0"]) == (None, TRAINED, 2 * TRAINED)
    (note,) = plan.notes
    assert note.startswith("loaded against the memory budget: test/large needs 262,144 bytes of memory on CUDA0")


def test_what_the_card_sets_and_what_is_the_default_are_told() -> None:
    assert planned(choices(n_ctx=False, trained=2 * TRAINED), 2 * TRAINED).limit == "set by the model card"
    bounded = planned(choices(longest=32_768, longest_because="the default on a CPU"), 2 * TRAINED)
    assert (bounded.context_length, bounded.limit) == (32_768, "the default on a CPU")
