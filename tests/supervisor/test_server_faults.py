"""Mistakes of the server's own, ordered: which runner they end, and when the process ends with the error."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import anyio
import psutil
import pytest

from exo.cards.card import ModelCard
from exo.worker.speed import Measurement
from exo.worker.supervisor.pool import RunnerPool
from tests import ROOT
from tests.conftest import fake_card
from tests.support.fake_runner import COMMAND
from tests.support.program import DEADLINE_SECONDS
from tests.support.runner_pool import ANEW, finishes
from tests.support.server import environment


def fail_to_measure(card: ModelCard, runner: str, measurement: Measurement) -> NoReturn:
    raise LookupError(f"ordered for {card.model_id}")


async def test_an_unexpected_error_ends_the_runner_that_it_is_about_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with anyio.fail_after(DEADLINE_SECONDS):
        async with RunnerPool((), tmp_path, {"cuda": COMMAND}, on_measured=fail_to_measure) as instances:
            cards = [fake_card(name, step_seconds=0.005) for name in ("failing", "other")]
            failing, other = (instances.acquire(ANEW, card) for card in cards)
            await failing.ready()
            await other.ready()
            assert await finishes(failing, "first, which is not measured")
            assert await finishes(failing, "second")
            failed = await failing.ended()
            assert failed.code == "runner_died"
            assert "LookupError('ordered for failing')" in failed.message
            assert await finishes(other)
            again = instances.acquire(ANEW, cards[0])
            assert again is not failing
            await again.ready()
            assert await finishes(again)
    assert "the server failed while it handled a runner" in caplog.text
    assert psutil.Process().children(recursive=True) == []


SERVER = """
import anyio
from exo.worker.supervisor import pool
from tests.support import fake_serve

async def fail(self):
    await anyio.sleep(0.5)
    raise LookupError("as ordered")

pool.RunnerPool.{method} = fail
fake_serve.main()
"""


@pytest.mark.parametrize("method", ["_maintain", "__aenter__"])
def test_a_server_that_cannot_go_on_exits_with_the_error(tmp_path: Path, method: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVER.format(method=method)],
        env=environment(tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert "LookupError: as ordered" in done.stderr
    assert "listening on http" in done.stdout


async def test_a_path_that_is_not_utf_8_does_not_end_a_runner(tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"caf\xe9")
    with anyio.fail_after(DEADLINE_SECONDS):
        async with RunnerPool((directory,), tmp_path, {"cuda": COMMAND}) as instances:
            process = instances.acquire(ANEW, fake_card())
            await process.ready()
            assert await finishes(process)
