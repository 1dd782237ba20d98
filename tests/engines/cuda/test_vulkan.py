"""The Vulkan plug-in: what a host is told without a working one, and that one that works computes.

The last tests need the plug-in (``exo setup vulkan``) and a Vulkan driver. Mesa's software driver is one: with
VK_DRIVER_FILES=lvp_icd.x86_64.json and GGML_VK_VISIBLE_DEVICES=0,0 llama.cpp takes it for two GPUs.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import llama_cpp
import pytest

from exo.worker.protocol.commands import Load
from exo.worker.protocol.probe import Probe
from exo.worker.runner_cuda.vulkan import LIBRARY, LOADER, VulkanPlugin, installed_vulkan
from tests.support.nvidia_driver import CRASHES, OLD_INTERFACE, StandIn, compiled, exo, install_driver, needs_gcc
from tests.support.program import Program, ask
from tests.support.tiny import Shape, write_gguf

RUNNER = (sys.executable, "-m", "exo.worker.runner_cuda")
BACKEND = "LlamaCppVulkan"


def probe(env: Mapping[str, str] | None = None) -> Probe:
    done = subprocess.run([*RUNNER, "--probe"], env=env, capture_output=True, check=True)
    return Probe.model_validate_json(done.stdout)


def stand_in(tmp_path: Path, source: str, bindings: str = "0.3.36", driver: StandIn | None = None) -> Mapping[str, str]:
    """The environment of a process that has a plug-in of this C source, and an empty Vulkan."""
    folder = tmp_path / "plugin"
    compiled(folder, LIBRARY, source)
    (folder / "libggml-base.so").symlink_to(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so.0")
    VulkanPlugin("stand-in", bindings).write(folder)
    env = install_driver(tmp_path / "driver", driver)
    compiled(tmp_path / "driver", LOADER, "")
    return {**env, "EXO_VULKAN_PLUGIN": str(folder), "EXO_CUDA_PLUGIN": str(tmp_path / "nothing")}


@needs_gcc
@pytest.mark.parametrize(
    ("source", "bindings", "expected"),
    [
        (CRASHES, "0.3.36", "trying the Vulkan plug-in ended with SIGABRT"),
        (OLD_INTERFACE, "0.3.36", "ggml refuses"),
        (CRASHES, "0.3.35", "it is for llama-cpp-python 0.3.35"),
    ],
)
def test_a_plug_in_that_does_not_work_leaves_the_cpu_and_is_named(
    tmp_path: Path, source: str, bindings: str, expected: str
) -> None:
    found = probe(stand_in(tmp_path, source, bindings))
    assert found.backends == ("LlamaCppCpu",)
    assert "no NVIDIA driver" in found.notes[0]
    assert expected in found.notes[1]
    assert found.remedy == "exo setup vulkan"


@needs_gcc
def test_an_nvidia_gpu_without_either_plug_in_is_advised_to_take_cuda(tmp_path: Path) -> None:
    found = probe(stand_in(tmp_path, CRASHES, driver=StandIn()))
    assert "there is no CUDA plug-in" in found.notes[0]
    assert found.remedy == "exo setup cuda"


@needs_gcc
def test_a_package_that_is_not_the_pinned_one_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin" / "npm"
    npm.write_text('#!/bin/sh\nwhile [ "$1" != --pack-destination ]; do shift; done; echo other > "$2/package.tgz"\n')
    npm.chmod(0o755)
    compiled(tmp_path / "driver", LOADER, "")
    env = {**install_driver(tmp_path / "driver", None), "EXO_VULKAN_PLUGIN": str(tmp_path / "plugin"), "EXO_HOME": ""}
    done = exo("setup", "vulkan", env={**env, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": str(tmp_path / "bin")})
    assert done.returncode == 1
    assert "the package is not the one that was examined" in done.stderr
    assert not (tmp_path / "plugin").exists()


def test_a_machine_without_vulkan_is_told_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / LOADER).write_bytes(b"not a library")
    done = exo("setup", "vulkan", env=install_driver(tmp_path / "driver", None))
    assert done.returncode == 1
    assert "Vulkan is not installed: " in done.stderr
    assert "apt install libvulkan1" in done.stderr


def test_zero_removes_the_plug_in(tmp_path: Path) -> None:
    (tmp_path / "plugin").mkdir()
    env = {**install_driver(tmp_path / "driver", None), "EXO_VULKAN_PLUGIN": str(tmp_path / "plugin")}
    assert exo("setup", "vulkan", "--source", "0", env=env).returncode == 0
    assert not (tmp_path / "plugin").exists()


@pytest.fixture(scope="module")
def devices() -> list[str]:
    """The names of Vulkan's devices."""
    if installed_vulkan() is None:
        pytest.skip("needs the Vulkan plug-in (exo setup vulkan) and a Vulkan driver, such as Mesa's for the CPU")
    found = [each.name for each in probe().devices if each.backend == BACKEND]
    if not found:
        pytest.skip("the Vulkan plug-in gives no device, or CUDA is used")
    return found


def test_each_device_computes_what_the_cpu_does(devices: list[str]) -> None:
    done = subprocess.run([*RUNNER, "--self-test", BACKEND], capture_output=True, check=True)
    assert [(each["device"], each["failure"]) for each in json.loads(done.stdout)] == [(each, "") for each in devices]


@pytest.mark.parametrize("kv", ["split", "pool"])
def test_a_model_is_divided_among_the_devices_and_generates(tmp_path: Path, devices: list[str], kv: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", Shape(head_dim=64))
    # Mesa's software driver (22.3) crashes in the shader of flash attention for some lengths.
    table = {"path": str(tmp_path / "tiny.gguf"), "n_ctx": 512, "slots": 2, "kv": kv, "threads": 1, "flash_attn": "off"}
    with Program(RUNNER) as program:
        capabilities = program.load(Load(model_id="test/tiny", backend=BACKEND, table=table))
        assert capabilities.backend == BACKEND
        assert capabilities.devices == tuple(devices)
        for result in program.generate(ask("first", max_tokens=8), ask("second", "one two three", max_tokens=8)):
            assert result.finished.reason == "length"
            assert len(result.tokens) == 8
