import os
from pathlib import Path

import pytest


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A FIFO at which a load waits until ``pass_gate``."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path
