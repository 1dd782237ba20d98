from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest
from pydantic import JsonValue

from exo.cards.card import ModelCard
from exo.worker.host import Host
from exo.worker.router import LiveRunner, Refusal, RemoteHosts, Route, route
from tests.support.routing import LIVE, able, make_card, make_host

pytestmark = pytest.mark.usefixtures("several_runners")

HERE = make_host("LlamaCppCpu")
GPU = make_host("LlamaCppCuda", "LlamaCppCpu")
THERE = replace(LIVE, instance="cuda.gpu2-1", host="gpu2")


def card_for(**fields: JsonValue | tuple[str, ...]) -> ModelCard:
    return make_card().model_copy(update=fields)


def decide(
    card: ModelCard,
    hosts: Mapping[str, Host],
    *live: LiveRunner,
    full: Collection[tuple[str, str]] = (),
    cached_on: str | None = None,
    failing: Collection[str] = (),
) -> Route:
    remote = RemoteHosts(hosts, {}, full, cached_on)
    answer = route(None, card, HERE, live, {}, failing, remote=remote)
    assert isinstance(answer, Route), answer
    return answer


def test_the_cards_order_of_backends_comes_before_the_order_of_hosts() -> None:
    found = decide(card_for(), {"gpu2": GPU})
    assert (found.backend, found.host, found.instance) == ("LlamaCppCuda", "gpu2", None)
    assert found.place == "cuda@gpu2"
    assert "LlamaCppCuda, which has no device here" in found.reason
    assert "LlamaCppCuda on gpu2 is next and available" in found.reason


def test_this_machine_comes_first_among_those_with_room() -> None:
    card = card_for(backends=("LlamaCppCpu",))
    assert decide(card, {"gpu2": GPU}).host == ""
    found = decide(card, {"gpu2": GPU}, full=[("LlamaCppCpu", "")])
    assert found.host == "gpu2"
    assert "LlamaCppCpu, which has no room" in found.reason
    everywhere = [("LlamaCppCpu", ""), ("LlamaCppCpu", "gpu2")]
    assert decide(card, {"gpu2": GPU}, full=everywhere).host == ""


def test_a_card_may_name_its_hosts() -> None:
    card = card_for(backends=("LlamaCppCpu",), hosts=("gpu3", "gpu2", "local"))
    assert decide(card, {"gpu2": GPU, "gpu3": GPU}).host == "gpu3"
    assert decide(card, {"gpu2": GPU}).host == "gpu2"
    assert decide(card, {}).host == ""


def test_a_loaded_model_is_used_where_it_is() -> None:
    card = card_for(backends=("LlamaCppCpu",))
    assert decide(card, {"gpu2": GPU}, THERE).instance == THERE.instance


def test_a_runner_of_a_lost_host_is_not_used() -> None:
    card = card_for(backends=("LlamaCppCpu",))
    found = decide(card, {}, THERE)
    assert (found.instance, found.host) == (None, "")


def test_requests_go_to_the_least_loaded_instance() -> None:
    card = card_for(backends=("LlamaCppCpu",))
    assert decide(card, {"gpu2": GPU}, replace(LIVE, active=3), replace(THERE, active=2)).host == "gpu2"
    assert decide(card, {"gpu2": GPU}, replace(LIVE, active=1), replace(THERE, active=2)).host == ""


def test_a_request_goes_where_its_prefix_is_unless_it_would_wait_there() -> None:
    card = card_for(backends=("LlamaCppCpu",))
    free, busy, full = replace(LIVE, active=1), replace(THERE, active=3), replace(THERE, active=4)
    assert decide(card, {"gpu2": GPU}, free, busy, cached_on=THERE.instance).host == "gpu2"
    assert decide(card, {"gpu2": GPU}, free, full, cached_on=THERE.instance).host == ""


def test_one_more_instance_is_wanted_when_all_slots_are_busy() -> None:
    card = card_for(backends=("LlamaCppCpu",))
    full = replace(LIVE, active=4)
    assert decide(card, {"gpu2": GPU}, LIVE).replica is None
    assert decide(card, {"gpu2": GPU}, full).replica == "gpu2"
    assert decide(card, {"gpu2": GPU}, full).instance == full.instance
    assert decide(card, {"gpu2": GPU}, full, replace(THERE, state="Loading", slots=0)).replica is None
    assert decide(card, {"gpu2": GPU}, full, full=[("LlamaCppCpu", "gpu2")]).replica is None
    assert decide(card, {"gpu2": GPU}, full, failing=["cuda@gpu2"]).replica is None
    assert decide(card, {}, full).replica is None


@pytest.mark.parametrize(("replicas", "wanted"), [(1, None), (2, "gpu2"), ("auto", "gpu2")])
def test_a_card_bounds_the_instances(replicas: JsonValue, wanted: str | None) -> None:
    card = card_for(backends=("LlamaCppCpu",), replicas=replicas)
    assert decide(card, {"gpu2": GPU}, replace(LIVE, active=4)).replica == wanted


def test_a_runner_that_keeps_failing_on_one_host_is_used_on_another() -> None:
    card = card_for(backends=("LlamaCppCpu",))
    assert decide(card, {"gpu2": GPU}, failing=["cuda"]).host == "gpu2"
    assert decide(card, {"gpu2": GPU}, failing=["cuda@gpu2"]).host == ""


def test_a_feature_that_a_host_lacks_is_looked_for_on_another() -> None:
    card = card_for(backends=("LlamaCppCpu",))
    lacking, having = replace(LIVE, capabilities=able()), replace(THERE, capabilities=able("logprobs"))
    answer = route(None, card, HERE, (lacking, having), {"logprobs": "logprobs"}, remote=RemoteHosts({"gpu2": GPU}))
    assert isinstance(answer, Route)
    assert answer.instance == THERE.instance


def test_a_refusal_says_why_a_host_is_left_out() -> None:
    card = card_for(backends=("LlamaCppCuda",))
    down = RemoteHosts({}, {"gpu2": "cannot be reached: timed out"})
    answer = route(None, card, HERE, (), {}, remote=down)
    assert isinstance(answer, Refusal)
    assert "host gpu2 cannot be reached: timed out" in answer.message
    answer = route(None, card_for(hosts=("gpu2", "gpu9")), HERE, (), {}, remote=down)
    assert isinstance(answer, Refusal)
    assert "host gpu2 cannot be reached: timed out; no host is called gpu9" in answer.message
