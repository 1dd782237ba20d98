"""Runners for the tests of the contract."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.cases import CASES, EVERY_RUNNER, SAMPLING, Start
from tests.support.program import Program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=EVERY_RUNNER)
def start(request: pytest.FixtureRequest, folder: Path) -> Iterator[Start]:
    starter = Start(CASES[request.param], folder, [])
    yield starter
    for program in starter.running:
        program.__exit__(None, None, None)


@pytest.fixture(scope="module", params=EVERY_RUNNER)
def program(request: pytest.FixtureRequest, folder: Path) -> Iterator[Program]:
    """One loaded runner for all tests that leave it as they found it."""
    starter = Start(CASES[request.param], folder, [])
    yield starter.loaded(slots=4, n_ctx=512)
    starter.running[0].__exit__(None, None, None)


@pytest.fixture(scope="module", params=SAMPLING)
def sampling_program(request: pytest.FixtureRequest, folder: Path) -> Iterator[Program]:
    starter = Start(CASES[request.param], folder, [])
    yield starter.loaded(slots=16, n_ctx=512)
    starter.running[0].__exit__(None, None, None)
