from pathlib import Path

import pytest


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """The two loops handle subprocesses differently, and the server may run on either."""
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "runner.log"
