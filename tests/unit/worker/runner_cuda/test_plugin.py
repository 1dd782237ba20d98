"""Which GPUs and drivers a CUDA plug-in fits."""

from pathlib import Path

import pytest

from exo.setup.cuda import PREBUILT
from exo.worker.protocol.nvidia_driver import Driver, Version
from exo.worker.runner_cuda.plugin import Plugin, PluginError, read_plugin

CUDA_13, CUDA_12 = (each.plugin for each in PREBUILT)


def why_not(plugin: Plugin, version: str, cuda: Version, *capabilities: Version) -> str:
    return plugin.why_not(Driver(version, cuda, capabilities))


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0), (12, 1)])
def test_machine_code_needs_only_a_driver_of_the_same_major_release(capability: Version) -> None:
    assert why_not(CUDA_13, "580.65.06", (13, 0), capability) == ""
    assert not CUDA_13.needs_ptx(Driver("580.65.06", (13, 0), (capability,)))
    assert "needs driver 580 or newer" in why_not(CUDA_13, "575.57.08", (12, 9), capability)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0), (12, 2), (15, 0)])
def test_ptx_needs_a_driver_that_knows_its_release(capability: Version) -> None:
    assert "does not compile PTX of CUDA 13.1" in why_not(CUDA_13, "580.95.05", (13, 0), capability)
    assert why_not(CUDA_13, "590.44.01", (13, 1), capability) == ""
    assert CUDA_13.needs_ptx(Driver("590.44.01", (13, 1), (capability,)))


def test_a_gpu_older_than_every_architecture_is_named() -> None:
    assert why_not(CUDA_13, "590.44.01", (13, 1), (8, 9), (6, 1)) == (
        "it has no machine code for compute capability 6.1"
    )
    assert why_not(CUDA_12, "590.44.01", (13, 1), (8, 9), (6, 1)) == ""


def test_cuda_12_serves_drivers_before_580_and_none_before_525() -> None:
    assert why_not(CUDA_12, "525.147.05", (12, 0), (8, 6)) == ""
    assert "does not compile PTX of CUDA 12.4" in why_not(CUDA_12, "525.147.05", (12, 0), (7, 5))
    assert why_not(CUDA_12, "550.54.14", (12, 4), (7, 5)) == ""
    assert why_not(CUDA_12, "470.256.02", (11, 4), (8, 6)) == (
        "driver 470.256.02 supports CUDA 11.4, and CUDA 12 needs driver 525 or newer"
    )


def test_a_driver_newer_than_the_plug_in_runs_it() -> None:
    assert why_not(CUDA_13, "700.10", (15, 2), (8, 9)) == why_not(CUDA_12, "700.10", (15, 2), (8, 9)) == ""


def test_a_description_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_plugin(tmp_path) is None
    CUDA_13.write(tmp_path)
    assert read_plugin(tmp_path) == CUDA_13


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"source": ""}',
        '{"source":1,"bindings":"","cuda":[1,2],"machine_code":["x"],"ptx":[],"libraries":[]}',
    ],
)
def test_a_broken_description_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "plugin.json").write_text(text)
    with pytest.raises(PluginError, match=r"plugin\.json is not a plug-in's description"):
        read_plugin(tmp_path)
