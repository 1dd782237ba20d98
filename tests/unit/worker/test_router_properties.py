"""Random cards, hosts and runners: what holds for every answer of the router."""

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo.cards.card import ModelCard
from exo.worker.host import Host
from exo.worker.protocol.events import RunnerState
from exo.worker.protocol.runners import RUNNERS, Need
from exo.worker.router import NEEDS, LiveRunner, Refusal, Route, route
from exo.worker.speed import Point, Preference
from tests.support.routing import BACKENDS, SPECS, able, make_card, make_host

pytestmark = pytest.mark.usefixtures("several_runners")


@st.composite
def cards(draw: st.DrawFn) -> ModelCard:
    backends = draw(st.lists(st.sampled_from(BACKENDS), min_size=1, unique=True))
    possible = [name for name, spec in SPECS.items() if set(spec.backends) & set(backends)]
    return make_card(backends, draw(st.sampled_from(["auto", *possible])))


@st.composite
def some_hosts(draw: st.DrawFn) -> Host:
    host = make_host(
        *draw(st.sets(st.sampled_from(BACKENDS))), missing=sorted(draw(st.sets(st.sampled_from([*SPECS]))))
    )
    return replace(host, probes={name: host.probes[name] for name in draw(st.sets(st.sampled_from([*SPECS])))})


def hosts() -> st.SearchStrategy[Host]:
    return st.just(make_host(*BACKENDS)) | some_hosts()


def live_runners() -> st.SearchStrategy[list[LiveRunner]]:
    """Few distinct values, so that ties and runners that differ in one thing are common."""
    runners = st.builds(
        LiveRunner,
        runner=st.sampled_from([*SPECS]),
        instance=st.uuids().map(str),
        model_id=st.sampled_from(["me/model", "me/model", "me/other"]),
        state=st.sampled_from(["Ready", "Ready", *get_args(RunnerState)]),
        slots=st.sampled_from([0, 2]),
        active=st.integers(0, 2),
        waiting=st.just(0),
        capabilities=st.sampled_from([None, able(), able("logprobs"), able(*NEEDS)]),
    )
    return st.lists(runners, max_size=8, unique_by=lambda each: each.instance)


wishes = st.none() | st.sampled_from([*SPECS, "tpu"])
asked = st.dictionaries(st.sampled_from(NEEDS), st.sampled_from(["logprobs", "response_format", "input"]), max_size=2)


points = st.builds(
    Point,
    first=st.sampled_from([0.1, 1]),
    stream=st.sampled_from([1, 100]),
    total=st.sampled_from([10, 10.5, 100]),
    count=st.just(3),
    at=st.just(0),
)
preferences = st.none() | st.builds(
    Preference,
    prefer=st.sampled_from(["latency", "throughput"]),
    load=st.integers(1, 20),
    speeds=st.dictionaries(st.sampled_from([*SPECS]), st.dictionaries(st.sampled_from([1, 4, 16]), points)),
    sent=st.dictionaries(st.sampled_from([*SPECS]), st.integers(0, 300)),
    incumbent=st.sampled_from([None, *SPECS]),
)
failures = st.sets(st.sampled_from([*SPECS]))


@given(wish=wishes, card=cards(), host=hosts(), live=live_runners(), needs=asked, failing=failures, load=preferences)
def test_a_preference_only_chooses_between_loaded_runners_of_which_each_would_do(
    wish: str | None,
    card: ModelCard,
    host: Host,
    live: list[LiveRunner],
    needs: dict[Need, str],
    failing: set[str],
    load: Preference | None,
) -> None:
    without = route(wish, card, host, live, needs, failing)
    answer = route(wish, card, host, live, needs, failing, load)
    if isinstance(without, Refusal) or isinstance(answer, Refusal) or load is None:
        assert answer == without
    elif answer.basis == "order":
        assert replace(answer, reason=without.reason) == without
        assert answer.reason.startswith(without.reason)
    else:
        assert wish is None
        assert not {"embeddings", "rerank"} & needs.keys()
        assert answer.instance is not None
        alone = route(answer.runner, card, host, live, needs, failing)
        assert isinstance(alone, Route)
        assert (answer.instance, answer.backend) == (alone.instance, alone.backend)
        assert next(each for each in live if each.instance == answer.instance).state in ("Ready", "Running")
        assert without.runner in failing or answer.runner not in failing


@given(wish=wishes, card=cards(), host=hosts(), live=live_runners(), needs=asked, load=preferences)
def test_a_route_is_never_what_request_card_host_or_needs_exclude(
    wish: str | None,
    card: ModelCard,
    host: Host,
    live: list[LiveRunner],
    needs: dict[Need, str],
    load: Preference | None,
) -> None:
    answer = route(wish, card, host, live, needs, preference=load)
    if not isinstance(answer, Route):
        return
    assert wish in (None, answer.runner)
    assert card.runner in ("auto", answer.runner)
    assert answer.backend in card.backends
    assert answer.backend in RUNNERS[answer.runner].backends
    assert host.probes[answer.runner].installed
    assert answer.backend in host.probes[answer.runner].backends
    if answer.instance is None:
        return
    (instance,) = [each for each in live if each.instance == answer.instance]
    assert (instance.runner, instance.model_id) == (answer.runner, card.model_id)
    assert instance.state not in ("Failed", "ShuttingDown", "Shutdown")
    assert all(instance.capabilities is None or getattr(instance.capabilities, need) for need in needs)


@given(wish=wishes, card=cards(), host=hosts(), live=live_runners(), needs=asked, load=preferences)
def test_every_answer_explains_itself(
    wish: str | None,
    card: ModelCard,
    host: Host,
    live: list[LiveRunner],
    needs: dict[Need, str],
    load: Preference | None,
) -> None:
    answer = route(wish, card, host, live, needs, preference=load)
    if isinstance(answer, Route):
        assert answer.backend in answer.reason
        assert answer.reason.isascii()
        assert answer.reason.isprintable()
        assert len(answer.reason) < 1000
    else:
        assert answer.message
        assert answer.param in ("model", *needs.values())
        assert (answer.code == "unsupported_parameter") == (answer.param != "model")


@given(wish=wishes, card=cards(), host=hosts(), live=live_runners(), needs=asked, data=st.data())
def test_the_same_question_has_the_same_answer_in_whatever_order_runners_are_listed(
    wish: str | None, card: ModelCard, host: Host, live: list[LiveRunner], needs: dict[Need, str], data: st.DataObject
) -> None:
    answer = route(wish, card, host, live, needs)
    assert route(wish, card, host, live, needs) == answer
    assert route(wish, card, host, data.draw(st.permutations(live)), needs) == answer
    assert route(wish, card, host, live, dict(reversed(needs.items()))) == answer


@given(card=cards(), host=hosts(), live=live_runners())
def test_a_model_is_refused_only_if_no_backend_of_it_is_on_the_host(
    card: ModelCard, host: Host, live: list[LiveRunner]
) -> None:
    allowed = {
        backend
        for name, probe in host.probes.items()
        if probe.installed and card.runner in ("auto", name)
        for backend in probe.backends
    }
    usable = [backend for backend in card.backends if backend in allowed]
    answer = route(None, card, host, live, {})
    assert (answer.backend if isinstance(answer, Route) else None) == (usable[0] if usable else None)
