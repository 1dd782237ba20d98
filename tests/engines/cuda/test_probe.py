"""``python -m exo.worker.runner_cuda --probe``."""

import subprocess
import sys

from exo.worker.protocol.probe import Probe
from exo.worker.protocol.runners import RUNNERS
from tests.support.program import runner_command

WITHOUT_LLAMA = """
import sys
sys.modules["llama_cpp"] = None
from exo.worker.runner_cuda.__main__ import main
sys.argv[1:] = ["--probe"]
main()
"""


def answer(command: list[str]) -> Probe:
    return Probe.model_validate_json(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def test_a_backend_is_named_where_llama_cpp_has_a_device_for_it() -> None:
    probe = answer([*runner_command(RUNNERS["cuda"].module), "--probe"])
    assert probe.installed
    assert probe.version
    assert "LlamaCppCpu" in probe.backends
    assert set(probe.backends) == {device.backend for device in probe.devices}
    assert ("LlamaCppCuda" in probe.backends) != any("CUDA" in note for note in probe.notes)


def test_a_host_without_llama_cpp_is_told_what_to_build() -> None:
    probe = answer([sys.executable, "-c", WITHOUT_LLAMA])
    assert not probe.installed
    assert probe.backends == ()
    assert "llama-cpp-python" in probe.notes[0]
    assert probe.remedy == "make llama"
