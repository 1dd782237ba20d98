"""The CUDA plug-in with stand-ins for the driver: what a host is told, and that the CPU serves whatever is broken."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from exo.worker.protocol.probe import Probe
from tests.support.nvidia_driver import (
    CRASHES,
    FITTING,
    OLD_INTERFACE,
    StandIn,
    compiled,
    install_driver,
    install_plugin,
    needs_gcc,
)

pytestmark = needs_gcc


def probe(env: Mapping[str, str]) -> Probe:
    command = [sys.executable, "-m", "exo.worker.runner_cuda", "--probe"]
    return Probe.model_validate_json(subprocess.run(command, env=env, capture_output=True, check=True).stdout)


def note(tmp_path: Path, env: Mapping[str, str]) -> tuple[str, str]:
    """The note on CUDA and the remedy; the CPU serves in any case."""
    nothing = str(tmp_path / "nothing")
    found = probe({"EXO_CUDA_PLUGIN": nothing, "EXO_VULKAN_PLUGIN": nothing, **env})
    assert found.installed
    assert found.backends == ("LlamaCppCpu",)
    return found.notes[0].removesuffix("; models run on the CPU"), found.remedy


def test_without_a_driver_nothing_is_to_be_mended(tmp_path: Path) -> None:
    told, remedy = note(tmp_path, install_driver(tmp_path, None))
    assert "no NVIDIA driver" in told
    assert remedy == ""


def test_a_gpu_without_a_plug_in_has_a_remedy(tmp_path: Path) -> None:
    told, remedy = note(tmp_path, install_driver(tmp_path, StandIn()))
    assert "an NVIDIA GPU is here, and there is no CUDA plug-in" in told
    assert remedy == "exo setup cuda"


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (StandIn(status=18, error="Driver/library version mismatch"), "Driver/library version mismatch; kernel module"),
        (StandIn(status=9, error="Driver Not Loaded"), "Driver Not Loaded; the kernel module is not loaded"),
        (StandIn("470.256.02", 11040), "driver 470.256.02 supports CUDA 11.4, and CUDA 13 needs driver 580 or newer"),
        (StandIn(capability=(9, 0)), "no machine code for compute capability 9.0; driver 580.95.05 supports CUDA 13.0"),
    ],
)
def test_a_driver_that_cannot_run_the_plug_in_is_told_so(tmp_path: Path, driver: StandIn, expected: str) -> None:
    env = {**install_driver(tmp_path / "driver", driver), **install_plugin(tmp_path / "plugin", CRASHES)}
    assert expected in note(tmp_path, env)[0]


def test_a_management_library_that_is_no_library_is_told(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"not a library")
    assert "libnvidia-ml.so.1 does not load" in note(tmp_path, install_driver(tmp_path, None))[0]


def test_a_plug_in_that_crashes_costs_only_the_gpu(tmp_path: Path) -> None:
    env = {**install_driver(tmp_path / "driver", StandIn()), **install_plugin(tmp_path / "plugin", CRASHES)}
    told, remedy = note(tmp_path, env)
    assert "ended with SIGABRT" in told
    assert remedy == "exo setup cuda"


def test_a_plug_in_of_another_interface_is_refused_by_ggml(tmp_path: Path) -> None:
    env = {**install_driver(tmp_path / "driver", StandIn()), **install_plugin(tmp_path / "plugin", OLD_INTERFACE)}
    assert "ggml refuses" in note(tmp_path, env)[0]


@pytest.mark.parametrize("capability", [(8, 9), (14, 0)])
def test_a_driver_and_a_gpu_newer_than_the_plug_in_do_not_keep_it_from_being_tried(
    tmp_path: Path, capability: tuple[int, int]
) -> None:
    """It has PTX, which the driver compiles for a GPU that has come later."""
    newer = install_driver(tmp_path / "driver", StandIn("650.10", 14010, capability))
    env = {**newer, **install_plugin(tmp_path / "plugin", OLD_INTERFACE)}
    assert "ggml refuses" in note(tmp_path, env)[0]


def test_a_gpu_newer_than_a_plug_in_without_ptx_is_named(tmp_path: Path) -> None:
    newer = install_driver(tmp_path / "driver", StandIn("650.10", 14010, (14, 0)))
    env = {**newer, **install_plugin(tmp_path / "plugin", CRASHES, replace(FITTING, ptx=()))}
    told, remedy = note(tmp_path, env)
    assert told.endswith("does not fit: it has no machine code for compute capability 14.0")
    assert remedy == "exo setup cuda"


def test_a_plug_in_for_other_bindings_is_not_loaded(tmp_path: Path) -> None:
    other = replace(FITTING, bindings="0.3.35")
    env = {**install_driver(tmp_path / "driver", StandIn()), **install_plugin(tmp_path / "plugin", CRASHES, other)}
    assert "it is for llama-cpp-python 0.3.35" in note(tmp_path, env)[0]


def test_a_second_ggml_base_would_be_a_second_list_of_devices(tmp_path: Path) -> None:
    env = {**install_driver(tmp_path / "driver", StandIn()), **install_plugin(tmp_path / "plugin", CRASHES)}
    (tmp_path / "plugin" / "libggml-base.so").unlink()
    compiled(tmp_path / "plugin", "libggml-base.so", "")
    assert "libggml-base.so does not lead to" in note(tmp_path, env)[0]


def test_a_plug_in_without_its_libraries_says_which(tmp_path: Path) -> None:
    env = {**install_driver(tmp_path / "driver", StandIn()), **install_plugin(tmp_path / "plugin", CRASHES)}
    (tmp_path / "plugin" / "libcublas.so.13").unlink()
    assert "libcublas.so.13: cannot open shared object file" in note(tmp_path, env)[0]


SELF_TEST = """
import ctypes, json, llama_cpp
from exo.worker.runner_cuda.loading.devices import Gpu
from exo.worker.runner_cuda import self_test
ggml = llama_cpp.llama_cpp._lib
ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
handle = ggml.ggml_backend_dev_get(ctypes.c_size_t(0))
class Elsewhere(Gpu):
    buffers = "CUDA0"
gpus = [Gpu("CPU", handle, False), Elsewhere("CUDA0", handle, False)]
failures = [each.failure for each in self_test.prove(gpus, 0.05)]
print(json.dumps([*failures, self_test.prove(gpus, -1.0)[0].failure]))
"""


def test_the_self_test_believes_only_a_device_that_holds_the_layers_and_computes_the_same() -> None:
    """The processors stand in for a GPU: under their own name they hold the layers, under another they do not."""
    done = subprocess.run([sys.executable, "-c", SELF_TEST], capture_output=True, text=True, check=True)
    right, elsewhere, beyond = json.loads(done.stdout)
    assert right == ""
    assert elsewhere.startswith("only 0% of the layers' bytes are on it")
    assert "differ from the CPU's by 0 nats, more than -1" in beyond
