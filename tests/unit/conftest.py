"""A unit test starts no process: one that does fails."""

import os
import sys

import pytest

_STARTS = {"subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "os.exec", "os.system"}


def _refuse(event: str, _: tuple[object, ...]) -> None:
    if event in _STARTS and os.environ.get("PYTEST_CURRENT_TEST", "").startswith("tests/unit/"):
        pytest.fail(f"a unit test starts no process ({event})")


sys.addaudithook(_refuse)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The standard event loop: uvloop starts processes without an audit event."""
    return "asyncio", {"use_uvloop": False}
