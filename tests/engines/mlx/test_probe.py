"""``python -m exo.worker.runner_mlx --probe``."""

import subprocess
import sys

from exo.worker.protocol.probe import Probe
from exo.worker.protocol.runners import RUNNERS
from tests.support.program import runner_command

WITHOUT_MLX = """
import sys
sys.modules["mlx"] = None
from exo.worker.runner_mlx.__main__ import main
sys.argv[1:] = ["--probe"]
main()
"""


def answer(command: list[str]) -> Probe:
    return Probe.model_validate_json(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def test_a_backend_is_named_where_mlx_computes_with_it() -> None:
    probe = answer([*runner_command(RUNNERS["mlx"].module), "--probe"])
    assert probe.installed
    assert "mlx-lm" in probe.version
    assert "MlxCpu" in probe.backends
    assert set(probe.backends) <= set(RUNNERS["mlx"].backends)
    assert [device.backend for device in probe.devices] == list(probe.backends)


def test_a_host_without_mlx_is_told_what_to_install() -> None:
    probe = answer([sys.executable, "-c", WITHOUT_MLX])
    assert not probe.installed
    assert probe.backends == ()
    assert "mlx" in probe.notes[0]
    assert probe.remedy == "pip install 'exo[mlx]'"
