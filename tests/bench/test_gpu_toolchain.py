"""What ``scripts/gpu_check`` builds with, or says is missing. The tools in PATH only answer; none computes."""

import sys
from pathlib import Path

import pytest

from bench.gpu_check import build, toolchain
from bench.gpu_check.record import CheckError

CARD = r"NVIDIA H200, 9.0, 580.65, 143771\n"
RELEASE = r"Cuda compilation tools, release 13.0, V13.0.88\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all there is in PATH, and where packages and a toolkit may lie."""
    for name in ("bin", "packages", "toolkit/bin"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages")])
    for name in ("CUDA_BIN", "DRIVER_BIN", "SYSTEM"):
        monkeypatch.setattr(toolchain, name, tmp_path / "nothing")
    monkeypatch.setattr(toolchain, "DRIVER_FOLDERS", ())
    return tmp_path


def program(machine: Path, name: str, script: str) -> None:
    file = machine / "bin" / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def card_and_compiler(machine: Path) -> None:
    program(machine, "nvidia-smi", f"printf '{CARD}'")
    program(
        machine,
        "nvcc",
        f"case $1 in --version) printf '{RELEASE}';; *) echo '#$ _HERE_={machine}/toolkit/bin' >&2;; esac",
    )


def packaged_cublas(machine: Path, major: str = "13") -> Path:
    folder = machine / "packages" / "nvidia" / "cu13"
    for name in ("include/cublas_v2.h", "include/cuda_runtime.h", f"lib/libcublas.so.{major}"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "lib" / f"libcublasLt.so.{major}").touch()
    return folder


def test_without_a_driver_it_says_so(machine: Path) -> None:
    with pytest.raises(CheckError, match="no NVIDIA driver here"):
        toolchain.find_cuda()


def test_without_a_card_it_says_what_the_driver_said(machine: Path) -> None:
    program(machine, "nvidia-smi", "echo No devices were found")
    with pytest.raises(CheckError, match="lists no GPU: No devices were found"):
        toolchain.find_cuda()


def test_a_driver_that_fails_is_quoted(machine: Path) -> None:
    program(machine, "nvidia-smi", "echo driver mismatch >&2; exit 18")
    with pytest.raises(CheckError, match="driver mismatch"):
        toolchain.find_cuda()


def test_without_nvcc_it_says_so(machine: Path) -> None:
    program(machine, "nvidia-smi", f"printf '{CARD}'")
    with pytest.raises(CheckError, match="no nvcc"):
        toolchain.find_cuda()


@pytest.mark.parametrize("packaged", [None, "12"])
def test_without_a_cublas_of_nvccs_release_it_names_the_package(machine: Path, packaged: str | None) -> None:
    card_and_compiler(machine)
    if packaged is not None:
        packaged_cublas(machine, packaged)
    with pytest.raises(CheckError, match=r"no cuBLAS for CUDA 13.*nvidia-cublas"):
        toolchain.find_cuda()


def test_cublas_is_found_beside_nvcc_or_else_among_packages(machine: Path) -> None:
    card_and_compiler(machine)
    packages = packaged_cublas(machine)
    found = toolchain.find_cuda()
    assert found.cublas == toolchain.Cublas(packages / "include", packages / "lib" / "libcublas.so.13")
    assert (found.version, found.toolkit) == ("13.0", machine / "toolkit")
    assert found.gpu == toolchain.Gpu("NVIDIA H200", "9.0", "580.65", 143771)
    for name in ("include/cublas_v2.h", "lib64/libcublas.so"):
        (machine / "toolkit" / name).parent.mkdir(exist_ok=True)
        (machine / "toolkit" / name).touch()
    assert toolchain.find_cuda().cublas is None


def test_it_builds_for_exactly_the_card_with_cublas_headers_alone(machine: Path) -> None:
    card_and_compiler(machine)
    packages = packaged_cublas(machine)
    stub = machine / "toolkit" / "lib64" / "stubs" / "libcuda.so"
    stub.parent.mkdir(parents=True)
    stub.touch()
    cuda = toolchain.find_cuda()
    assert cuda.driver == stub
    arguments = build.cuda_arguments(cuda, machine / "build")
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real" in arguments
    assert f"-DCUDA_cublas_LIBRARY={packages}/lib/libcublas.so.13" in arguments
    assert f"-DCUDA_cublasLt_LIBRARY={packages}/lib/libcublasLt.so.13" in arguments
    assert f"-DCMAKE_BUILD_RPATH={machine}/toolkit/lib64;{packages}/lib" in arguments
    assert f"-DCMAKE_CUDA_FLAGS=-I{machine}/build/cublas" in arguments
    assert [header.name for header in (machine / "build" / "cublas").iterdir()] == ["cublas_v2.h"]


def test_without_libcuda_it_is_built_without_the_part_that_links_to_it(tmp_path: Path) -> None:
    card = toolchain.Gpu("some", "12.0", "1", 1)
    cuda = toolchain.Cuda("nvcc", "13.0", tmp_path, card, None, None)
    arguments = build.cuda_arguments(cuda, tmp_path)
    assert "-DGGML_CUDA_NO_VMM=ON" in arguments
    assert "-DCMAKE_CUDA_ARCHITECTURES=120-real" in arguments
