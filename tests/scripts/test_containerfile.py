"""The container image. It is built where podman is; here it is linted."""

import subprocess
import sys
from pathlib import Path

from tests import ROOT


def test_the_containerfile_has_no_fault_that_a_linter_finds() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, ROOT / "Containerfile"], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""
