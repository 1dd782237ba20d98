"""Runners for the tests of the contract."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.contract.cases import CASES, EVERY_RUNNER, SAMPLING, Case, Shared, Start
from tests.support.program import Program


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="package")
def shared(folder: Path) -> Iterator[Shared]:
    runners = Shared(folder)
    yield runners
    runners.stop()


@pytest.fixture
def cases() -> Mapping[str, Case]:
    """A file that starts its runners otherwise replaces this fixture."""
    return CASES


@pytest.fixture(params=EVERY_RUNNER)
def start(request: pytest.FixtureRequest, cases: Mapping[str, Case], folder: Path) -> Iterator[Start]:
    starter = Start(cases[request.param], folder, [])
    yield starter
    for program in starter.running:
        program.__exit__(None, None, None)


@pytest.fixture(params=EVERY_RUNNER)
def program(request: pytest.FixtureRequest, cases: Mapping[str, Case], shared: Shared) -> Program:
    """One loaded runner for all tests that leave it as they found it."""
    return shared.program(cases[request.param])


@pytest.fixture(params=SAMPLING)
def sampling_program(request: pytest.FixtureRequest, cases: Mapping[str, Case], shared: Shared) -> Program:
    """The same runner; only of those that have a model to sample from."""
    return shared.program(cases[request.param])


@pytest.fixture(params=EVERY_RUNNER)
def slow_program(request: pytest.FixtureRequest, cases: Mapping[str, Case], shared: Shared) -> Program:
    """One with two slots, for tests that step in between two tokens or two chunks of a prompt."""
    return shared.slow(cases[request.param])
