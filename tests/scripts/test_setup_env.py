"""What ``make`` builds llama.cpp with, decided by the tools found in PATH. These tools only answer; none computes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests import ROOT

SCRIPT = ROOT / "scripts" / "setup_env.py"


@pytest.fixture
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tools(folder: Path, patch: pytest.MonkeyPatch, **answers: str) -> None:
    """Makes PATH hold nothing but programs that print these answers."""
    for name, answer in answers.items():
        program = folder / name.replace("_", "-")
        program.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
        program.chmod(0o755)
    patch.setenv("PATH", str(folder))


def test_the_cards_found_are_built_for(setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools(tmp_path, monkeypatch, nvcc="", nvidia_smi=r"9.0\n8.9\n9.0\n")
    arguments = setup_env.cmake_arguments("auto", "")
    assert "-DGGML_CUDA=on" in arguments
    assert "-DCMAKE_CUDA_ARCHITECTURES=89-real;90-real" in arguments
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path / 'nvcc'}" in arguments


def test_architectures_that_are_given_count_more_than_those_found(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools(tmp_path, monkeypatch, nvcc="", nvidia_smi=r"9.0\n")
    assert "-DCMAKE_CUDA_ARCHITECTURES=120-real" in setup_env.cmake_arguments("auto", "120-real")


@pytest.mark.parametrize(("cuda", "answers"), [("auto", {"nvcc": ""}), ("0", {"nvcc": "", "nvidia_smi": r"9.0\n"})])
def test_without_a_driver_or_when_told_so_it_is_built_for_the_cpu(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str, answers: dict[str, str]
) -> None:
    tools(tmp_path, monkeypatch, **answers)
    assert not any("CUDA" in argument for argument in setup_env.cmake_arguments(cuda, ""))


def test_cuda_without_a_card_or_architectures_is_refused_with_what_to_say(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools(tmp_path, monkeypatch, nvcc="")
    with pytest.raises(SystemExit, match="CUDA_ARCHS"):
        setup_env.cmake_arguments("1", "")
