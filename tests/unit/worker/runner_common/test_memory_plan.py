"""Which ways to load a model there are, from what its parts take. Pure."""

from dataclasses import replace
from itertools import pairwise

from exo.worker.protocol.events import Estimated, LoadOption
from exo.worker.runner_common.memory_plan import (
    LONG,
    SHORTEST,
    USABLE,
    OnDevices,
    Open,
    Part,
    Plan,
    cells,
    estimated,
    steps,
)

WEIGHTS = 1000


def size(plan: Plan) -> list[Part]:
    """Ten layers of a hundred bytes, and one byte of cache for each token and part; half of that if quantised."""
    on_device = 100 * (plan.n_gpu_layers or 0)
    cache = plan.parts * cells(plan.n_ctx) // (2 if plan.cache_type else 1)
    return [Part("weights", WEIGHTS - on_device, on_device), Part("KV cache", cache), Part("compute", 7, 3, later=True)]


def test_a_card_that_leaves_nothing_open_has_one_choice() -> None:
    estimate = estimated(Plan(4096, 2), Open(), size)
    (choice,) = estimate.choices
    assert choice.settings == {}
    assert (choice.host, choice.device) == (WEIGHTS + 2 * 4096 + 7, 3)
    assert (choice.later_host, choice.later_device) == (7, 3)
    assert choice.parts == {"weights": WEIGHTS, "KV cache": 8192, "compute": 7}


def test_remedies_change_one_setting_at_a_time_the_smallest_change_first() -> None:
    estimate = estimated(Plan(1024, 3), Open(), size, ["q8_0"])
    settings = [dict(each.settings) for each in estimate.remedies]
    assert settings == [
        {"n_ctx": 768},
        {"n_ctx": 512},
        {"slots": 2},
        {"slots": 1},
        {"cache_type_k": "q8_0", "cache_type_v": "q8_0"},
        {"n_ctx": 512, "slots": 1},
    ]
    (whole,) = estimate.choices
    assert all(each.host < whole.host for each in estimate.remedies)


def test_fewer_layers_on_the_device_are_a_remedy_that_costs_memory_of_the_processors() -> None:
    estimate = estimated(Plan(512, 1, n_gpu_layers=3), Open(layers=3), size)
    assert [each.settings for each in estimate.remedies] == [{"n_gpu_layers": count} for count in (2, 1, 0)]
    assert [each.device for each in estimate.remedies] == [203, 103, 3]


def test_a_projector_leaves_the_device_before_layers_do_and_costs_no_context_below_a_usable_one() -> None:
    def with_projector(plan: Plan) -> list[Part]:
        return [*size(plan), Part("projector", device=500 if plan.projector_on_gpu else 0)]

    left = Open(n_ctx=True, slots=True, n_gpu_layers=True, layers=3, trained=2 * USABLE, projector=True)
    estimate = estimated(Plan(2 * USABLE, 2, n_gpu_layers=3), left, with_projector)
    places = [each.settings["mmproj_offload"] is True for each in estimate.choices]
    assert places == sorted(places, reverse=True)
    assert places[estimate.enough]
    on_gpu, in_ram = estimate.choices[: places.count(True)], estimate.choices[places.count(True) :]
    assert all(each.settings["n_gpu_layers"] == 3 for each in on_gpu)
    assert [{**each.settings, "mmproj_offload": True} for each in in_ram[: len(on_gpu)]] == [
        each.settings for each in on_gpu
    ]
    assert in_ram[-1].settings["n_gpu_layers"] == 0


def fitting(estimate: Estimated, memory: int) -> LoadOption:
    """The best option for so many bytes of RAM, with devices that hold anything."""
    return next(each for each in estimate.choices if each.host <= memory)


def test_an_open_context_is_at_most_what_the_model_was_trained_for_and_others_go_for_a_usable_one() -> None:
    estimate = estimated(Plan(65536, 1), Open(n_ctx=True, trained=65536), size)
    lengths = [int(str(each.settings["n_ctx"])) for each in estimate.choices]
    assert (lengths[0], lengths[-1]) == (65536, SHORTEST)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[estimate.enough] == USABLE
    assert [each.host for each in estimate.choices] == sorted((each.host for each in estimate.choices), reverse=True)


def test_a_model_trained_for_less_has_no_longer_context() -> None:
    estimate = estimated(Plan(300, 1), Open(n_ctx=True, trained=300), size)
    assert [each.settings for each in estimate.choices] == [{"n_ctx": 300}]


def test_a_long_context_comes_before_a_second_slot_and_a_very_long_one_after_it() -> None:
    estimate = estimated(Plan(4 * LONG, 4), Open(n_ctx=True, slots=True, trained=4 * LONG), size)
    found = [
        (int(str(option.settings["n_ctx"])), option.settings["slots"])
        for cells_free in (USABLE // 2, USABLE, 3 * USABLE, LONG, 2 * LONG, 4 * LONG, 16 * LONG)
        for option in [fitting(estimate, WEIGHTS + 7 + cells_free)]
    ]
    (tiny, one), usable, (middle, single), *long = found
    assert (one, single) == (1, 1)
    assert tiny < USABLE < middle < LONG
    assert usable == (USABLE, 1)
    first, second, (longer, slots), most = long
    assert (first, second, slots, most) == ((LONG, 1), (LONG, 2), 2, (4 * LONG, 4))
    assert LONG < longer <= 2 * LONG
    settings = estimate.choices[estimate.enough].settings
    assert (settings["n_ctx"], settings["slots"]) == (USABLE, 1)


def test_a_pool_takes_the_place_of_a_single_slot() -> None:
    left = Open(n_ctx=True, slots=True, pool=True, trained=2 * USABLE)
    estimate = estimated(Plan(2 * USABLE, 4), left, size)
    found = [
        (option.settings["n_ctx"], option.settings["slots"], option.settings["kv"])
        for cells_free in (8 * USABLE, 4 * USABLE, 4 * USABLE - 1, USABLE, 512)
        for option in [fitting(estimate, WEIGHTS + 7 + cells_free)]
    ]
    whole = 2 * USABLE
    assert found[:3] == [(whole, 4, "split"), (whole, 2, "split"), (whole, 4, "pool")]
    assert found[3:] == [(USABLE, 4, "pool"), (SHORTEST, 4, "pool")]
    settings = estimate.choices[estimate.enough].settings
    assert (settings["n_ctx"], settings["kv"]) == (USABLE, "pool")
    layouts = [option.layout.kv for option in estimate.choices if option.layout is not None]
    assert layouts == [option.settings["kv"] for option in estimate.choices]


def test_more_memory_never_gives_less_context() -> None:
    left = Open(n_ctx=True, slots=True, small_cache="q8_0", trained=4 * LONG)
    estimate = estimated(Plan(4 * LONG, 4, cache_type="f16"), left, quantised)
    contexts = [
        int(str(fitting(estimate, memory).settings["n_ctx"])) for memory in range(WEIGHTS + 1000, 20 * LONG, 4999)
    ]
    assert contexts == sorted(contexts)
    assert USABLE in contexts


def quantised(plan: Plan) -> list[Part]:
    return size(replace(plan, cache_type=None) if plan.cache_type == "f16" else plan)


def test_a_smaller_type_of_the_cache_is_used_for_a_usable_context_only_where_the_card_allows_it() -> None:
    memory = WEIGHTS + 7 + USABLE // 2
    given = Plan(65536, 1, cache_type="f16")
    estimate = estimated(given, Open(n_ctx=True, small_cache="q8_0", trained=65536), quantised)
    assert fitting(estimate, memory).settings == {"n_ctx": USABLE, "cache_type_k": "q8_0", "cache_type_v": "q8_0"}
    assert fitting(estimate, WEIGHTS + 7 + USABLE).settings["cache_type_k"] == "f16"
    without = estimated(given, Open(n_ctx=True, trained=65536), quantised, ["q8_0"])
    assert int(str(fitting(without, memory).settings["n_ctx"])) < USABLE
    longer = next(each for each in without.longer if each.host <= memory)
    assert longer.settings == {"n_ctx": USABLE, "cache_type_k": "q8_0", "cache_type_v": "q8_0"}


def test_layers_leave_the_device_once_there_is_no_room_for_a_usable_context() -> None:
    left = Open(n_ctx=True, n_gpu_layers=True, trained=2 * USABLE, layers=2)
    estimate = estimated(Plan(2 * USABLE, 1, n_gpu_layers=2), left, size)
    settings = [(each.settings["n_ctx"], each.settings["n_gpu_layers"]) for each in estimate.choices]
    usable = estimate.enough
    assert settings[0] == (2 * USABLE, 2)
    assert settings[usable : usable + 3] == [(USABLE, 2), (USABLE, 1), (USABLE, 0)]
    assert all(int(str(n_ctx)) < USABLE for n_ctx, _ in settings[usable + 3 :])


ONE, OTHER, BOTH = OnDevices(("A",)), OnDevices(("B",)), OnDevices(("A", "B"), (1, 1))


def test_one_device_comes_before_several_and_free_memory_on_any_before_unloading_others() -> None:
    left = Open(n_ctx=True, slots=True, trained=USABLE, placements=((ONE, OTHER), (BOTH,)))
    estimate = estimated(Plan(USABLE, 2), left, size)
    good = estimate.choices[: estimate.enough + estimate.as_good + 1]
    assert [(each.settings["devices"], each.settings["slots"]) for each in good] == [
        (["A"], 2),
        (["B"], 2),
        (["A"], 1),
        (["B"], 1),
        (["A", "B"], 2),
        (["A", "B"], 1),
    ]
    assert estimate.choices[estimate.enough].settings["devices"] == ["A"]


def test_a_very_long_context_does_not_take_a_second_device_by_itself() -> None:
    left = Open(n_ctx=True, trained=2 * LONG, placements=((ONE, OTHER), (BOTH,)), longest_divided=LONG)
    estimate = estimated(Plan(2 * LONG, 1), left, size)
    longest = {
        len(names): max(
            int(str(each.settings["n_ctx"])) for each in estimate.choices if each.settings["devices"] == names
        )
        for names in (["A"], ["A", "B"])
    }
    assert longest == {1: 2 * LONG, 2: LONG}


def test_the_cache_takes_no_more_than_its_bound_while_there_is_a_smaller_choice() -> None:
    bounded = estimated(Plan(USABLE, 4), Open(n_ctx=True, slots=True, trained=USABLE, most_cache=70_000), size)
    assert (bounded.choices[0].settings["n_ctx"], bounded.choices[0].settings["slots"]) == (USABLE, 2)
    none = estimated(Plan(USABLE, 4), Open(n_ctx=True, slots=True, trained=USABLE, most_cache=0), size)
    assert [each.settings for each in none.choices] == [{"n_ctx": SHORTEST, "slots": 1}]


def test_steps_are_about_an_eighth_and_end_in_whole_blocks() -> None:
    lengths = steps(131072, 512)
    assert lengths[0] == 131072
    assert lengths[-1] == 512
    assert len(lengths) < 50
    assert all(shorter < longer <= shorter * 2 for longer, shorter in pairwise(lengths))
    assert all(length % 256 == 0 for length in lengths[1:])
