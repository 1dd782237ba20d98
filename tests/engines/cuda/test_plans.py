"""The plans for every built-in model on GPUs of every usual size, for the models' real shapes."""

from itertools import product

import pytest

from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue
from exo.worker.protocol.events import RAM, LoadOption
from exo.worker.runner_common.memory_plan import LONGEST_TEXT, USABLE
from exo.worker.runner_common.model_files.gguf import GgufHeader
from exo.worker.supervisor.dry_run import decided
from exo.worker.supervisor.memory.budget import MemoryBudget
from exo.worker.supervisor.memory.memory import HOST, Memory
from exo.worker.supervisor.placement_plan import PlacementPlan
from tests.support import plan_table
from tests.support.model_shapes import SHAPES, header
from tests.support.plan_table import GIB, GPUS, PAGE, capacity, cards, estimated

SMALL_HOST = 6 * GIB
LARGER = (
    ("8 GiB", "12 GiB"),
    ("12 GiB", "16 GiB"),
    ("16 GiB", "24 GiB"),
    ("24 GiB", "2 x 24 GiB"),
    ("2 x 24 GiB", "80 GiB"),
)


@pytest.fixture(scope="module")
def plans() -> dict[tuple[str, str], PlacementPlan]:
    """By model and GPUs."""
    models = [card.model_id for card in cards()]
    return {(model, name): plan_table.plan(model, gpus) for model, (name, gpus) in product(models, GPUS.items())}


def longest(card: ModelCard) -> int:
    """The most tokens that exo gives a request if memory does not limit it."""
    return LONGEST_TEXT if "TextEmbedding" in card.tasks else card.context_length


def test_every_built_in_card_for_llama_cpp_has_a_shape_of_its_files_size() -> None:
    built_in = {card.model_id for card in Catalogue.load().cards.values() if "cuda" in card.engines}
    assert built_in == set(SHAPES)
    for card in cards():
        found = header(card.model_id)
        weights = sum(each.size for each in found.tensors)
        assert 0.97 * card.storage_size.in_bytes < weights < card.storage_size.in_bytes
        assert number(found, "block_count") == card.n_layers
        assert number(found, "embedding_length") == card.hidden_size
        assert number(found, "context_length") == card.context_length


def test_a_model_that_sees_pictures_keeps_its_layers_on_the_gpu(plans: dict[tuple[str, str], PlacementPlan]) -> None:
    """Text alone keeps its layers on the GPU, and the context that fits without the projector or 32,768 tokens."""
    seeing = [card for card in cards() if "mmproj" in card.engines["cuda"]]
    assert len(seeing) == 4
    places: set[object] = set()
    for card, (name, gpus) in product(seeing, GPUS.items()):
        blind = card.model_copy(update={"engines": {"cuda": {**card.engines["cuda"], "mmproj": None}}})
        before = decided(card.model_id, "cuda", estimated(blind, gpus), capacity(gpus))
        after = plans[card.model_id, name]
        assert after.layers == before.layers, (card.model_id, name)
        assert after.context_length >= min(USABLE, before.context_length)
        places.add(after.settings["mmproj_offload"])
    assert places == {True, False}


def number(found: GgufHeader, key: str) -> int:
    return found.integer(f"{found.architecture}.{key}", -1)


def test_no_plan_takes_more_than_there_is(plans: dict[tuple[str, str], PlacementPlan]) -> None:
    for (model, gpus), plan in plans.items():
        room = capacity(GPUS[gpus])
        needed = dict(plan.memory)
        assert Memory(needed.pop(HOST), needed).fits(room), (model, gpus)
        assert plan.problem is None


@pytest.mark.parametrize(("smaller", "larger"), LARGER)
def test_more_memory_never_makes_a_plan_worse(
    plans: dict[tuple[str, str], PlacementPlan], smaller: str, larger: str
) -> None:
    for card in cards():
        before, after = plans[card.model_id, smaller], plans[card.model_id, larger]
        assert after.context_length >= before.context_length, card.model_id
        if after.context_length == before.context_length:
            assert tokens(after) >= tokens(before), card.model_id
            assert after.experts_in_ram <= before.experts_in_ram, card.model_id
            assert after.layers.get(RAM, 0) <= before.layers.get(RAM, 0), card.model_id


def tokens(plan: PlacementPlan) -> int:
    """The tokens of all slots together."""
    return plan.context_length * (1 if plan.kv == "pool" else plan.slots)


def test_a_request_gets_32768_tokens_with_64_gib_of_ram(plans: dict[tuple[str, str], PlacementPlan]) -> None:
    for card in cards():
        for gpus in GPUS:
            assert plans[card.model_id, gpus].context_length >= min(USABLE, longest(card)), (card.model_id, gpus)


def test_with_little_ram_a_request_gets_32768_tokens_where_any_setting_reaches_them() -> None:
    beyond = 0
    gpus = (16,)
    for card in cards():
        room = Memory(SMALL_HOST, capacity(gpus).devices)
        plan = decided(card.model_id, "cuda", estimated(card, gpus), room)
        if plan.problem is None and plan.context_length >= min(USABLE, longest(card)):
            continue
        beyond += 1
        every = card.n_layers + 1
        experts = range(every if SHAPES[card.model_id].experts else 1)
        ways = {*product(range(every + 1), (experts[0], experts[-1])), *product((every,), experts)}
        for n_gpu_layers, cpu_moe in ways:
            (option, *_) = estimated(
                card, gpus, n_ctx=USABLE, slots=1, n_gpu_layers=n_gpu_layers, cpu_moe=cpu_moe
            ).choices
            assert not fits(option, room), (card.model_id, gpus, dict(option.settings))
    assert beyond


def fits(option: LoadOption, room: Memory) -> bool:
    return MemoryBudget(room).need(option).fits(room)


def test_whole_layers_leave_the_gpu_only_after_all_experts(plans: dict[tuple[str, str], PlacementPlan]) -> None:
    mixtures = [card for card in cards() if SHAPES[card.model_id].experts]
    assert len(mixtures) == 4
    kept = {plans[card.model_id, "8 GiB"].experts_in_ram for card in mixtures}
    assert min(kept) > 0
    for card in mixtures:
        for gpus in GPUS:
            assert plans[card.model_id, gpus].layers.get(RAM, 0) == 0


@pytest.mark.parametrize("gpus", [(8, 8), (6, 8), (6, 6, 6)])
def test_gpus_that_share_a_mixture_of_experts_are_filled_alike(gpus: tuple[int, ...]) -> None:
    """The first layers, whose experts are in RAM, take much less than the others."""
    kept = 0
    for card in cards():
        if not SHAPES[card.model_id].experts:
            continue
        plan = plan_table.plan(card.model_id, gpus)
        filled = [plan.memory[f"CUDA{at}"] / size for at, size in enumerate(gpus)]
        if plan.experts_in_ram:
            assert min(filled) > 0.9 * max(filled), (card.model_id, plan)
        kept += plan.experts_in_ram > 0
    assert kept >= 3


def test_the_table_in_the_documentation_is_that_of_these_plans() -> None:
    text = PAGE.read_text()
    assert text == plan_table.page(text), "python -m tests.support.plan_table writes it"
