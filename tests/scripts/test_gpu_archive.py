"""What ``make gpu-archive`` packs, and how."""

import importlib.util
import json
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from bench.gpu_check.options import ROOT
from tests.support.nvidia_driver import compiled, needs_gcc


@pytest.fixture(scope="module")
def archive() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_archive", ROOT / "scripts" / "gpu_archive.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_packages_are_pinned_and_none_is_for_another_engine(archive: ModuleType) -> None:
    pins = archive.requirements()
    names = {pin.split("==")[0].lower() for pin in pins}
    assert all("==" in pin for pin in pins)
    assert {"pydantic", "numpy", "llguidance", "gguf", "pytest", "pytest-xdist", "execnet", "pip"} <= names
    assert not {name for name in names if name.startswith(("mlx", "torch", "transformers", "llama"))}


def test_the_modules_of_the_bindings_are_packed_without_their_server_and_libraries(archive: ModuleType) -> None:
    names = {name for name, _ in archive.modules()}
    assert {"llama_cpp/__init__.py", "llama_cpp/llama_cpp.py", "llama_cpp/_ggml.py"} <= names
    assert all(name.count("/") == 1 and name.endswith(".py") for name in names)


@needs_gcc
def test_the_same_input_gives_the_same_archive_whose_wheels_open_and_programs_run(
    archive: ModuleType, tmp_path: Path
) -> None:
    wheel = tmp_path / "some-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("some.py", "x = 1\n" * 1000)
    (tmp_path / "plugin.json").write_text(json.dumps({"bindings": "1"}))
    program = tmp_path / "llama-server"
    shutil.copy(shutil.which("true") or "", program)
    compiled(tmp_path, "libllama.so.0", "int answer(void) { return 42; }\n")
    members = [
        ("wheels/some-1-py3-none-any.whl", wheel),
        ("plugin/plugin.json", tmp_path / "plugin.json"),
        ("bin/llama-server", program),
        ("bin/libllama.so.0", tmp_path / "libllama.so.0"),
    ]
    outputs = [tmp_path / "one.tar.xz", tmp_path / "two.tar.xz"]
    assert [archive.pack(output, given) for output, given in zip(outputs, (members, members[::-1]), strict=True)] == [
        4,
        4,
    ]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    unpacked = tmp_path / "unpacked"
    with tarfile.open(outputs[0]) as packed:
        packed.extractall(unpacked, filter="data")
    with zipfile.ZipFile(unpacked / "wheels" / wheel.name) as opened:
        assert opened.read("some.py") == b"x = 1\n" * 1000
    assert (unpacked / "plugin" / "plugin.json").read_text() == '{"bindings": "1"}'
    assert subprocess.run([unpacked / "bin" / "llama-server"], check=False).returncode == 0
