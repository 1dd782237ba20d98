"""Adapters, on every runner that has them: each request is computed with its own, in any company."""

from collections.abc import Mapping

import numpy as np
import pytest

from exo.worker.protocol.commands import Generate, UsedAdapter
from tests.contract.cases import ADAPTED, ADAPTERS, CASES, Case, Shared, goes_on_from_everywhere, long_prompt, one
from tests.support.program import Program, Result, ask, names

NAME = names()
ALL = ("", *ADAPTERS)


@pytest.fixture(params=ADAPTED)
def case(request: pytest.FixtureRequest, cases: Mapping[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture
def adapted(case: Case, shared: Shared) -> Program:
    return shared.adapted(case)


def asked(adapter: str, prompt: str | list[int] = "once upon a time", max_tokens: int = 16, seed: int = 0) -> Generate:
    """Every other seed samples at temperature 1."""
    request = ask(next(NAME), prompt, max_tokens=max_tokens, seed=seed, temperature=seed % 2)
    return request.model_copy(update={"adapters": (UsedAdapter(name=adapter),) if adapter else ()})


def logprobs(result: Result) -> np.ndarray:
    """The log-probabilities of the first place, by token, of tokens that are among the most probable in any case."""
    (found,) = result.logprobs
    return np.array([each.logprob for each in sorted(found.top, key=lambda each: each.token)])


def test_each_adapter_has_its_own_effect(adapted: Program) -> None:
    assert adapted.capabilities is not None
    assert adapted.capabilities.adapters == ADAPTERS
    requests = [asked(each, max_tokens=1).model_copy(update={"logprobs": 20}) for each in ALL]
    base, first, second = (logprobs(one(adapted, request)) for request in requests)
    for left, right in ((base, first), (base, second), (first, second)):
        assert not np.allclose(left, right, atol=0.1)


def test_a_text_does_not_depend_on_the_adapters_of_other_requests(adapted: Program) -> None:
    prompts = ["once upon a time", long_prompt(70), long_prompt(200)]
    wanted = [(each, prompt, seed) for seed, prompt in enumerate(prompts) for each in ALL]
    alone = [one(adapted, asked(each, prompt, 30, seed)).tokens for each, prompt, seed in wanted]
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    together = adapted.generate(*(asked(each, prompt, 30, seed) for each, prompt, seed in wanted))
    assert [result.tokens for result in together] == alone


def test_without_an_adapter_a_runner_with_adapters_computes_what_one_without_does(
    case: Case, adapted: Program, shared: Shared
) -> None:
    prompt = long_prompt(40)
    assert one(adapted, asked("", prompt, 30)).tokens == one(shared.program(case), asked("", prompt, 30)).tokens


def test_a_prefix_is_used_again_with_its_own_adapter_only(case: Case, adapted: Program) -> None:
    stem = [98 + index % 7 for index in range(160)]
    for adapter in ALL:
        first, again = (one(adapted, asked(adapter, stem)) for _ in range(2))
        assert first.finished.usage.cached_tokens == 0
        assert again.finished.usage.cached_tokens == (len(stem) - 1) // case.cache_block * case.cache_block
        assert again.tokens == first.tokens


def test_a_request_goes_on_with_its_adapter(adapted: Program) -> None:
    for adapter in ADAPTERS:
        goes_on_from_everywhere(adapted, asked(adapter, long_prompt(7), 12))


def test_an_unknown_adapter_is_refused_and_the_known_ones_are_named(adapted: Program) -> None:
    failed = one(adapted, asked("three")).failed
    assert (failed.code, failed.param) == ("invalid_request", "adapters")
    assert failed.message == "adapters: there is no adapter 'three'; accepted are one, two"


def test_scales_and_several_adapters_are_used_or_refused(adapted: Program) -> None:
    assert adapted.capabilities is not None
    base, first, second = (one(adapted, asked(each)) for each in ALL)
    both = (UsedAdapter(name="one", scale=1), UsedAdapter(name="two", scale=1))
    half, none, together = (
        one(adapted, asked("").model_copy(update={"adapters": used}))
        for used in ((UsedAdapter(name="one", scale=0.5),), (UsedAdapter(name="one", scale=0),), both)
    )
    if adapted.capabilities.adapter_scales:
        assert none.tokens == base.tokens
        assert len({tuple(each.tokens) for each in (base, first, second, half, together)}) == 5
        return
    for refused in (half, none, together):
        assert (refused.failed.code, refused.failed.param) == ("invalid_request", "adapters")
        assert refused.failed.message == "adapters: only one adapter can be used here, with its own scale"


def test_an_adapter_is_used_once(adapted: Program) -> None:
    failed = one(adapted, asked("").model_copy(update={"adapters": (UsedAdapter(name="one"),) * 2})).failed
    assert failed.message == "adapters: 'one' is used twice"


def test_all_runners_choose_the_same_tokens(shared: Shared) -> None:
    found = {
        name: [one(shared.adapted(case), asked(each, long_prompt(30), 24)).tokens for each in ALL]
        for name, case in CASES.items()
        if name in ("cuda", "mlx")
    }
    assert found["cuda"] == found["mlx"]
