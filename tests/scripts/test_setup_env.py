"""``scripts/setup_env.py`` and ``exo setup``: the driver and the environment that they find."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.support.nvidia_driver import StandIn, install_driver, needs_gcc

SCRIPT = ROOT / "scripts" / "setup_env.py"
ASK = f"import runpy; print(runpy.run_path({str(SCRIPT)!r})['has_gpu']())"


@needs_gcc
@pytest.mark.parametrize(("driver", "found"), [(None, "False"), (StandIn(), "True"), (StandIn(status=18), "True")])
def test_a_driver_is_found_before_anything_is_installed(tmp_path: Path, driver: StandIn | None, found: str) -> None:
    command = [sys.executable, "-S", "-c", ASK]
    env = install_driver(tmp_path, driver)
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip() == found


def test_a_source_of_cuda_that_there_is_not_is_refused() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--cuda", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "prebuilt" in done.stderr
