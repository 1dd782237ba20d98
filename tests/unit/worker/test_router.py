from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from pydantic import JsonValue

from exo.cards.card import ModelCard, Task
from exo.worker.host import Host
from exo.worker.protocol.events import RunnerState
from exo.worker.protocol.runners import RUNNERS, Need
from exo.worker.router import LiveRunner, Refusal, Route, Wish, parse_model, route
from exo.worker.speed import Point, Preference
from tests.support.routing import LIVE, SPECS, able, make_card, make_host

pytestmark = pytest.mark.usefixtures("several_runners")

REAL = dict(RUNNERS)
Needs = dict[Need, str]


def routed(
    card: ModelCard,
    host: Host,
    *live: LiveRunner,
    wish: str | None = None,
    needs: Mapping[Need, str] | None = None,
) -> Route:
    answer = route(wish, card, host, live, needs or {})
    assert isinstance(answer, Route), answer
    return answer


def refused(
    card: ModelCard,
    host: Host,
    *live: LiveRunner,
    wish: str | None = None,
    needs: Mapping[Need, str] | None = None,
) -> Refusal:
    answer = route(wish, card, host, live, needs or {})
    assert isinstance(answer, Refusal), answer
    return answer


@pytest.mark.parametrize(
    ("model", "wish"),
    [
        ("gemma-3-270m@cuda", Wish("gemma-3-270m", "cuda")),
        ("google/gemma-3-270m", Wish("google/gemma-3-270m", None)),
        ("a@b@mlx", Wish("a@b", "mlx")),
        ("model@", Wish("model", "")),
        ("", Wish("", None)),
    ],
)
def test_a_models_name_may_carry_a_runner(model: str, wish: Wish) -> None:
    assert parse_model(model) == wish


def test_no_backend_is_served_by_two_runners() -> None:
    served = [backend for spec in REAL.values() for backend in spec.backends]
    assert len(served) == len(set(served))


def test_the_cards_first_backend_is_taken_where_the_host_has_it() -> None:
    answer = routed(make_card(), make_host("LlamaCppCuda", "LlamaCppCpu"))
    assert answer == Route("cuda", None, "LlamaCppCuda", "card prefers LlamaCppCuda, which is available")


def test_the_next_backend_is_taken_where_the_first_has_no_device() -> None:
    answer = routed(make_card(), make_host("LlamaCppCpu"))
    reason = "card prefers LlamaCppCuda, which has no device here; LlamaCppCpu is next and available"
    assert answer == Route("cuda", None, "LlamaCppCpu", reason)


def test_every_backend_passed_over_is_explained() -> None:
    card = make_card(["Vllm", "MlxCuda", "LlamaCppCuda", "LlamaCppCpu"])
    assert routed(card, make_host("LlamaCppCpu", missing=["mlx"])).reason == (
        "card prefers Vllm, which is served by no runner of this version; "
        "MlxCuda needs runner mlx, which is not installed here; "
        "LlamaCppCuda has no device here; LlamaCppCpu is next and available"
    )


def test_the_requests_wish_passes_over_the_cards_order() -> None:
    card = make_card(["MlxCpu", "LlamaCppCuda", "LlamaCppCpu"])
    answer = routed(card, make_host("MlxCpu", "LlamaCppCpu"), wish="cuda")
    assert (answer.runner, answer.backend) == ("cuda", "LlamaCppCpu")
    assert answer.reason == (
        "request asks for runner cuda; LlamaCppCuda has no device here; LlamaCppCpu is next and available"
    )


def test_the_cards_flag_decides_between_its_backends() -> None:
    answer = routed(make_card(["MlxCpu", "LlamaCppCpu"], runner="cuda"), make_host("MlxCpu", "LlamaCppCpu"))
    assert answer == Route("cuda", None, "LlamaCppCpu", "card asks for runner cuda; LlamaCppCpu is available")


@pytest.mark.parametrize("wish", ["tpu", "", "CUDA"])
def test_a_wish_for_an_unknown_runner_names_the_known_ones(wish: str) -> None:
    answer = refused(make_card(), make_host("LlamaCppCpu"), wish=wish)
    assert (answer.code, answer.param) == ("runner_not_found", "model")
    assert answer.message == f"there is no runner {wish!r}; known are {', '.join(RUNNERS)}"


def test_a_wish_does_not_overrule_the_card() -> None:
    host = make_host("MlxCpu", "LlamaCppCpu")
    by_flag = refused(make_card(["MlxCpu", "LlamaCppCpu"], runner="cuda"), host, wish="mlx")
    assert by_flag.code == "runner_unavailable"
    assert by_flag.message == "the card of me/model asks for runner cuda, so runner mlx may not serve it"
    by_backends = refused(make_card(), host, wish="mlx")
    assert by_backends.code == "runner_unavailable"
    assert "lists only LlamaCppCuda, LlamaCppCpu" in by_backends.message


def test_a_model_that_makes_no_text_is_refused_with_what_it_is_for() -> None:
    card = make_card().model_copy(update={"tasks": ("TextToImage",)})
    refusal = route(None, card, make_host("LlamaCppCpu"), (), {})
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.param) == ("unsupported_task", "model")
    assert "TextToImage" in refusal.message


@pytest.mark.parametrize(
    ("tasks", "needs", "fits"),
    [
        (("TextGeneration",), {"embeddings": "input"}, True),
        (("TextEmbedding",), {"embeddings": "input"}, True),
        (("TextEmbedding",), {}, False),
        (("TextRanking",), {"rerank": "documents"}, True),
        (("TextRanking",), {"embeddings": "input"}, False),
        (("TextGeneration", "TextEmbedding"), {"rerank": "documents"}, False),
        (("TextEmbedding", "TextRanking"), {"rerank": "documents"}, True),
    ],
)
def test_what_a_card_is_for_decides_what_may_be_asked_of_it(
    tasks: tuple[Task, ...], needs: dict[Need, str], fits: bool
) -> None:
    card = make_card(["AbacusWood"]).model_copy(update={"tasks": tasks})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNNERS, "abacus", replace(SPECS["abacus"], features=frozenset({"embeddings", "rerank"})))
        answer = route(None, card, make_host("AbacusWood"), (), needs)
    if fits:
        assert isinstance(answer, Route)
    else:
        assert isinstance(answer, Refusal)
        assert (answer.code, answer.param) == ("unsupported_task", "model")
        assert ", ".join(tasks) in answer.message


@pytest.mark.parametrize(
    ("tasks", "backend"), [(("TextGeneration", "TextEmbedding"), "LlamaCppCpu"), (("TextEmbedding",), "AbacusWood")]
)
@pytest.mark.parametrize("loading", [False, True])
def test_what_a_model_is_loaded_apart_for_is_not_expected_of_one_that_generates(
    tasks: tuple[Task, ...], backend: str, loading: bool
) -> None:
    card = make_card(["AbacusWood", "LlamaCppCpu"]).model_copy(update={"tasks": tasks})
    starting = replace(LIVE, runner="abacus", instance="abacus-1", state="Loading", capabilities=None)
    features: frozenset[Need] = frozenset({"embeddings"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNNERS, "abacus", replace(SPECS["abacus"], features=features, exclusive_tasks=features))
        patch.setitem(RUNNERS, "cuda", replace(SPECS["cuda"], features=features))
        answer = route(
            None, card, make_host("AbacusWood", "LlamaCppCpu"), [starting] * loading, {"embeddings": "input"}
        )
    assert isinstance(answer, Route)
    assert answer.backend == backend


def test_a_card_of_backends_without_runner_names_what_is_served() -> None:
    answer = refused(make_card(["Vllm"]), make_host("LlamaCppCpu"))
    assert answer.code == "runner_unavailable"
    assert "me/model, which are Vllm" in answer.message
    assert "LlamaCppCuda" in answer.message


def test_a_host_without_engine_is_told_the_remedy() -> None:
    answer = refused(make_card(), make_host(missing=["cuda"]))
    assert (answer.code, answer.param) == ("runner_unavailable", "model")
    assert answer.message == (
        "no runner can serve me/model here: LlamaCppCuda needs runner cuda, which is not installed here; "
        "LlamaCppCpu needs runner cuda, which is not installed here; no cuda library; to fix it: install cuda"
    )


def test_a_refused_wish_does_not_claim_that_no_other_runner_could() -> None:
    card = make_card(["MlxCpu", "LlamaCppCpu"])
    answer = refused(card, make_host("LlamaCppCpu", missing=["mlx"]), wish="mlx")
    assert answer.message.startswith("runner mlx cannot serve me/model here: MlxCpu needs runner mlx, which")
    assert "LlamaCppCpu" not in answer.message


def test_a_feature_that_nothing_supports_is_refused_by_parameter() -> None:
    needs: dict[Need, str] = {"logprobs": "top_logprobs"}
    answer = refused(make_card(), make_host("LlamaCppCpu"), needs=needs)
    assert (answer.code, answer.param) == ("unsupported_parameter", "top_logprobs")
    assert answer.message == (
        "parameter 'top_logprobs' needs logprobs, and no runner can do that for me/model here: "
        "LlamaCppCuda has no device here; LlamaCppCpu does not support logprobs"
    )


def test_a_feature_picks_the_runner_that_has_it() -> None:
    answer = routed(
        make_card(["LlamaCppCpu", "MlxCpu"]), make_host("LlamaCppCpu", "MlxCpu"), needs={"logprobs": "logprobs"}
    )
    assert answer.runner == "mlx"
    assert answer.reason == "card prefers LlamaCppCpu, which does not support logprobs; MlxCpu is next and available"


def test_a_picture_needs_a_card_that_names_what_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPECS["cuda"], features=frozenset({"vision"}), keys={"vision": "mmproj"})
    monkeypatch.setitem(RUNNERS, "cuda", spec)
    needs: dict[Need, str] = {"vision": "messages[0].content[1]"}
    answer = refused(make_card(), make_host("LlamaCppCpu"), needs=needs)
    assert (answer.code, answer.param) == ("unsupported_parameter", "messages[0].content[1]")
    seeing = make_card().model_copy(update={"engines": {"cuda": {"mmproj": "mmproj.gguf"}}})
    assert routed(seeing, make_host("LlamaCppCpu"), needs=needs).runner == "cuda"


def test_a_picture_goes_to_the_engine_that_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPECS["cuda"], features=frozenset({"vision"}), keys={"vision": "mmproj"})
    monkeypatch.setitem(RUNNERS, "cuda", spec)
    needs: dict[Need, str] = {"vision": "messages.0.content.0.image_url"}
    card = make_card(["MlxCpu", "LlamaCppCpu"]).model_copy(update={"engines": {"cuda": {"mmproj": "mmproj.gguf"}}})
    host = make_host("MlxCpu", "LlamaCppCpu")
    answer = routed(card, host, needs=needs)
    assert (answer.runner, "MlxCpu, which does not support vision" in answer.reason) == ("cuda", True)
    assert routed(card, host).runner == "mlx"
    blind = refused(card, host, wish="mlx", needs=needs)
    assert (blind.code, blind.param) == ("unsupported_parameter", "messages.0.content.0.image_url")
    assert "needs vision, and runner mlx cannot do that" in blind.message


def test_scales_of_adapters_go_to_an_engine_that_has_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPECS["cuda"], features=frozenset({"adapter_scales"}), keys={"adapter_scales": "lora"})
    monkeypatch.setitem(RUNNERS, "cuda", spec)
    lora: list[JsonValue] = [{"name": "sql"}, {"name": "legal"}]
    engines: dict[str, dict[str, JsonValue]] = {"mlx": {"lora": lora}, "cuda": {"lora": lora[:1]}}
    card = make_card(["MlxCpu", "LlamaCppCpu"]).model_copy(update={"engines": engines})
    host, scaled = make_host("MlxCpu", "LlamaCppCpu"), Needs({"adapter_scales": "lora"})

    def chosen(*adapters: str, needs: Needs, wish: str | None = None) -> str:
        answer = route(wish, card, host, (), needs, adapters=adapters)
        return answer.runner if isinstance(answer, Route) else f"{answer.param}: {answer.message}"

    assert chosen("sql", needs={}) == chosen("legal", needs={}) == "mlx"
    assert chosen("sql", needs=scaled) == "cuda"
    for wish in (None, "cuda"):
        refusal = chosen("sql", "legal", needs=scaled, wish=wish)
        assert refusal.startswith("lora: ")
        assert "has no adapter 'legal' in [cuda] of the model card" in refusal


def test_what_a_loaded_model_can_do_counts_more_than_what_its_runner_can_do() -> None:
    needs: dict[Need, str] = {"logprobs": "logprobs"}
    host = make_host("LlamaCppCpu", "MlxCpu")
    loaded = replace(LIVE, capabilities=able("logprobs"))
    assert routed(make_card(), host, loaded, needs=needs).instance == "cuda-1"
    assert refused(make_card(), host, LIVE, needs=needs).code == "unsupported_parameter"
    assert routed(make_card(), host, replace(LIVE, instance="a"), loaded).instance == "a"
    assert routed(make_card(), host, replace(LIVE, instance="a"), loaded, needs=needs).instance == "cuda-1"
    unable = replace(LIVE, runner="mlx", instance="mlx-1")
    assert refused(make_card(["MlxCpu"]), host, unable, needs=needs).param == "logprobs"
    loading = replace(unable, state="Loading", slots=0, capabilities=None)
    assert routed(make_card(["MlxCpu"]), host, loading, needs=needs).instance == "mlx-1"


def test_a_live_runner_of_the_model_is_used_and_no_other() -> None:
    host = make_host("LlamaCppCpu")
    assert routed(make_card(), host, LIVE).instance == "cuda-1"
    assert routed(make_card(), host, replace(LIVE, model_id="me/other")).instance is None
    assert routed(make_card(), host, replace(LIVE, runner="mlx")).instance is None
    gone: tuple[RunnerState, ...] = ("ShuttingDown", "Shutdown", "Failed")
    assert [routed(make_card(), host, replace(LIVE, state=state)).instance for state in gone] == [None] * 3


def test_the_least_loaded_runner_is_used_and_a_ready_one_before_one_that_loads() -> None:
    loading = replace(LIVE, instance="a", state="Loading", slots=0, capabilities=None)
    busy = replace(LIVE, instance="b", state="Running", slots=2, active=2)
    large = replace(LIVE, instance="c", state="Running", slots=16, active=12)
    full = replace(LIVE, instance="d", state="Running", slots=16, active=16, waiting=40)
    host = make_host("LlamaCppCpu")
    assert routed(make_card(), host, loading, full, large, busy).instance == "c"
    assert routed(make_card(), host, loading, full, busy).instance == "b"
    assert routed(make_card(), host, full, loading).instance == "d"
    assert routed(make_card(), host, loading).instance == "a"
    twin = replace(busy, instance="e")
    assert routed(make_card(), host, busy, twin) == routed(make_card(), host, twin, busy)


def test_a_runner_that_keeps_failing_is_left_out_where_another_will_do() -> None:
    card, host = make_card(("LlamaCppCuda", "LlamaCppCpu", "MlxCpu")), make_host("LlamaCppCpu", "MlxCpu")
    moved = route(None, card, host, (), {}, {"cuda"})
    assert isinstance(moved, Route)
    assert (moved.runner, moved.backend) == ("mlx", "MlxCpu")
    assert "LlamaCppCpu is left out while runner cuda keeps failing; MlxCpu is next and available" in moved.reason
    for stays in (
        route("cuda", card, host, (), {}, {"cuda"}),
        route(None, make_card(), host, (), {}, {"cuda"}),
        route(None, card, host, (), {}, {"cuda", "mlx"}),
        route(None, card, host, (), {}, {"mlx"}),
    ):
        assert isinstance(stays, Route)
        assert stays.runner == "cuda"
        assert "keeps failing" not in stays.reason


# --- choice by load ---

BOTH = ("LlamaCppCpu", "MlxCpu")
ON_CUDA = LIVE
ON_MLX = replace(LIVE, runner="mlx", instance="mlx-1", capabilities=able(backend="MlxCpu"))


def preference(load: int = 1, **totals: float) -> Preference:
    """For throughput, with what each runner makes at any load."""
    speeds = {
        runner: {at: Point(first=0.1, stream=total, total=total, count=3, at=0) for at in (1, 64)}
        for runner, total in totals.items()
    }
    return Preference("throughput", load, speeds, {})


def preferred(
    *live: LiveRunner,
    asked: Preference,
    wish: str | None = None,
    card: ModelCard | None = None,
    needs: Mapping[Need, str] | None = None,
    failing: Sequence[str] = (),
) -> Route:
    answer = route(wish, card or make_card(BOTH), make_host(*BOTH), live, needs or {}, failing, asked)
    assert isinstance(answer, Route), answer
    return answer


def test_of_loaded_runners_the_one_that_measured_faster_is_taken_and_the_reason_has_the_figures() -> None:
    assert preferred(ON_CUDA, ON_MLX, asked=preference(9, cuda=60, mlx=140)) == Route(
        "mlx",
        "mlx-1",
        "MlxCpu",
        "prefer throughput: of 9 at once, mlx made 140 tokens/s and cuda 60, so MlxCpu is chosen",
        "figures",
    )
    assert preferred(ON_CUDA, ON_MLX, asked=preference(9, cuda=140, mlx=60)).instance == "cuda-1"


def test_a_runner_that_lacks_measurements_is_tried_where_it_is_loaded() -> None:
    answer = preferred(ON_CUDA, ON_MLX, asked=preference(2, cuda=60))
    assert (answer.runner, answer.basis) == ("mlx", "trial")
    assert answer.reason == "prefer throughput: too little is measured of mlx with 2 at once, so MlxCpu is chosen"


@pytest.mark.parametrize("state", ["Loading", "WarmingUp", "ShuttingDown", "Failed"])
def test_what_is_not_loaded_is_not_chosen_by_load(state: RunnerState) -> None:
    answer = preferred(ON_CUDA, replace(ON_MLX, state=state), asked=preference(cuda=60, mlx=140))
    assert answer == Route(
        "cuda",
        "cuda-1",
        "LlamaCppCpu",
        "card prefers LlamaCppCpu, which is available; "
        "prefer throughput has a choice once several runners have loaded the model",
    )


def test_with_one_runner_to_choose_from_nothing_is_said_of_preference() -> None:
    asked = preference(cuda=60, mlx=140)
    wished = preferred(ON_CUDA, ON_MLX, asked=asked, wish="cuda")
    assert wished.reason == "request asks for runner cuda; LlamaCppCpu is available"
    flagged = preferred(ON_CUDA, ON_MLX, asked=asked, card=make_card(BOTH, runner="cuda"))
    assert flagged.reason == "card asks for runner cuda; LlamaCppCpu is available"
    alone = preferred(ON_CUDA, ON_MLX, asked=asked, card=make_card(["LlamaCppCuda", "LlamaCppCpu"]))
    assert "prefer throughput" not in alone.reason


def test_a_failing_or_incapable_runner_is_not_taken_however_fast_it_was() -> None:
    asked = preference(cuda=140, mlx=60)
    answer = preferred(ON_CUDA, ON_MLX, asked=asked, failing=["cuda"])
    assert answer.runner == "mlx"
    assert "LlamaCppCpu, which is left out while runner cuda keeps failing" in answer.reason
    both = preferred(ON_CUDA, ON_MLX, asked=preference(cuda=60, mlx=140), failing=["cuda", "mlx"])
    assert both.reason.endswith("mlx made 140 tokens/s and cuda 60, so MlxCpu is chosen")
    able_mlx = replace(ON_MLX, capabilities=able("logprobs", backend="MlxCpu"))
    assert preferred(ON_CUDA, able_mlx, asked=asked, needs={"logprobs": "logprobs"}).runner == "mlx"


def test_what_generates_no_text_goes_by_the_cards_order() -> None:
    vectors = [replace(each, capabilities=able("embeddings")) for each in (ON_CUDA, ON_MLX)]
    answer = preferred(*vectors, asked=preference(cuda=60, mlx=140), needs={"embeddings": "input"})
    assert (answer.runner, answer.reason) == ("cuda", "card prefers LlamaCppCpu, which is available")


def test_backends_that_were_not_compared_are_explained_as_well() -> None:
    card = make_card(["Vllm", "AbacusWood", "LlamaCppCuda", *BOTH])
    host = make_host(*BOTH, "AbacusWood")
    answer = route(None, card, host, [ON_CUDA, ON_MLX], {}, (), preference(cuda=60, mlx=140))
    assert isinstance(answer, Route)
    assert answer.reason == (
        "prefer throughput: of 1 at once, mlx made 140 tokens/s and cuda 60, so MlxCpu is chosen; "
        "Vllm is served by no runner of this version; AbacusWood is not loaded; LlamaCppCuda has no device here"
    )
