"""Asking a runner how it would load a model, in a process of its own."""

import pytest

from exo.worker.protocol.commands import Load
from exo.worker.supervisor.dry_run import dry_run
from exo.worker.supervisor.memory.memory import Memory

LOAD = Load(model_id="test/tiny", backend="LlamaCppCpu")


@pytest.mark.parametrize("script", ["exit 1", "sleep 1 & exit 1", "echo '{}'; sleep 1 & exit 1"])
async def test_a_runner_that_ends_without_an_answer_has_no_plan(script: str) -> None:
    """In two cases its output ends later than the process."""
    assert await dry_run(("sh", "-c", script), LOAD, "cuda", Memory(1 << 30)) is None
