"""What ``make gpu-archive`` packs, and how."""

import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from bench.gpu_check.options import ROOT


@pytest.fixture(scope="module")
def archive() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_archive", ROOT / "scripts" / "gpu_archive.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LLAMA = "vendor/llama.cpp/"


@pytest.mark.parametrize(
    "path",
    [
        "llama_cpp/llama_cpp.py",
        LLAMA + "CMakeLists.txt",
        LLAMA + "LICENSE",
        LLAMA + "cmake/llama-config.cmake.in",
        LLAMA + "ggml/src/ggml.c",
        LLAMA + "ggml/src/ggml-cuda/template-instances/mmq-instance-q4_0.cu",
        LLAMA + "ggml/src/ggml-cpu/ggml-cpu.cpp",
        LLAMA + "ggml/include/ggml-vulkan.h",
        LLAMA + "scripts/ui-assets.cmake",
        LLAMA + "tools/ui/CMakeLists.txt",
        LLAMA + "tools/ui/ui.h.in",
        LLAMA + "tools/server/server.cpp",
        LLAMA + "vendor/cpp-httplib/httplib.h",
    ],
)
def test_the_archive_has_what_the_build_reads(archive: ModuleType, path: str) -> None:
    assert archive.wanted(path)


@pytest.mark.parametrize(
    "path",
    [
        "llama_cpp/server/app.py",
        "docs/index.md",
        "examples/server/server.py",
        LLAMA + "models/ggml-vocab-bert-bge.gguf",
        LLAMA + "docs/build.md",
        LLAMA + "tests/test-backend-ops.cpp",
        LLAMA + "ggml/src/ggml-vulkan/ggml-vulkan.cpp",
        LLAMA + "ggml/src/ggml-metal/CMakeLists.txt",
        LLAMA + "tools/ui/src/lib/index.ts",
        LLAMA + "tools/mtmd/test-1.jpeg",
        LLAMA + "gguf-py/gguf/constants.py",
    ],
)
def test_the_archive_has_no_other_back_ends_models_or_documents(archive: ModuleType, path: str) -> None:
    assert not archive.wanted(path)


def test_packages_are_pinned_and_none_is_for_another_engine(archive: ModuleType) -> None:
    pins = archive.requirements()
    names = {pin.split("==")[0].lower() for pin in pins}
    assert all("==" in pin for pin in pins)
    assert {"pydantic", "numpy", "llguidance", "gguf", "pytest", "pip"} <= names
    assert not {name for name in names if name.startswith(("mlx", "torch", "transformers", "llama"))}


def test_the_same_input_gives_the_same_archive_with_wheels_that_still_open(archive: ModuleType, tmp_path: Path) -> None:
    sources = tmp_path / "llama_cpp_python-1.tar.gz"
    with tarfile.open(sources, "w:gz") as package:
        for name in ("llama_cpp/__init__.py", LLAMA + "CMakeLists.txt", LLAMA + "docs/a.md"):
            entry = tarfile.TarInfo(f"llama_cpp_python-1/{name}")
            entry.size = 2
            package.addfile(entry, io.BytesIO(b"1\n"))
    wheels = tmp_path / "wheels-3.12"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "some-1-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("some.py", "x = 1\n" * 1000)
    outputs = [tmp_path / "one.tar.xz", tmp_path / "two.tar.xz"]
    assert [archive.pack(output, sources, [wheels]) for output in outputs] == [3, 3]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    with tarfile.open(outputs[0]) as packed:
        assert packed.getnames() == [
            "llama-cpp-python/llama_cpp/__init__.py",
            f"llama-cpp-python/{LLAMA}CMakeLists.txt",
            "wheels/some-1-py3-none-any.whl",
        ]
        packed.extractall(tmp_path / "unpacked", filter="data")
    with zipfile.ZipFile(tmp_path / "unpacked" / "wheels" / "some-1-py3-none-any.whl") as wheel:
        assert wheel.read("some.py") == b"x = 1\n" * 1000
