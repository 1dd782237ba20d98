"""Which ways to load a model there are, from what its parts take. Pure."""

from itertools import pairwise

from exo.worker.runner_common.memory_plan import SHORTEST, USUAL, Open, Part, Plan, cells, estimated, steps

WEIGHTS = 1000


def size(plan: Plan) -> list[Part]:
    """Ten layers of a hundred bytes, and one byte of cache for each token and slot; half of that if quantised."""
    on_device = 100 * (plan.n_gpu_layers or 0)
    cache = plan.slots * cells(plan.n_ctx) // (2 if plan.cache_type else 1)
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


def test_an_open_context_is_at_most_what_the_model_was_trained_for_and_others_go_for_the_usual_one() -> None:
    estimate = estimated(Plan(USUAL, 1), Open(n_ctx=True, trained=32768), size)
    lengths = [each.settings["n_ctx"] for each in estimate.choices]
    assert lengths[0] == 32768
    assert lengths[-1] == SHORTEST
    assert lengths == sorted(lengths, key=lambda length: -int(str(length)))
    assert lengths[estimate.enough] == next(length for length in lengths if int(str(length)) <= USUAL)
    assert [each.host for each in estimate.choices] == sorted((each.host for each in estimate.choices), reverse=True)


def test_a_model_trained_for_less_has_no_longer_context() -> None:
    estimate = estimated(Plan(300, 1), Open(n_ctx=True, trained=300), size)
    assert [each.settings for each in estimate.choices] == [{"n_ctx": 300}]


def test_layers_leave_the_device_once_the_context_is_no_longer_than_usual() -> None:
    left = Open(n_ctx=True, n_gpu_layers=True, trained=8192, layers=2)
    estimate = estimated(Plan(USUAL, 1, n_gpu_layers=2), left, size)
    settings = [(each.settings["n_ctx"], each.settings["n_gpu_layers"]) for each in estimate.choices]
    usual = estimate.enough
    assert settings[0] == (8192, 2)
    context = settings[usual][0]
    assert settings[usual : usual + 3] == [(context, 2), (context, 1), (context, 0)]
    assert all(layers == 0 for _, layers in settings[usual + 3 :])


def test_steps_are_about_an_eighth_and_end_in_whole_blocks() -> None:
    lengths = steps(131072, 512)
    assert lengths[0] == 131072
    assert lengths[-1] == 512
    assert len(lengths) < 50
    assert all(shorter < longer <= shorter * 2 for longer, shorter in pairwise(lengths))
    assert all(length % 256 == 0 for length in lengths[1:])
