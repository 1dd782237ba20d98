"""The wheel of the llama.cpp runner, in an environment that has another package ``exo``."""

import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest

from exo.worker.protocol.commands import Load
from tests import ROOT
from tests.contract.cases import gguf_table
from tests.support.program import Program, ask


def pack(folder: Path) -> Path:
    script = ROOT / "scripts" / "runner_wheel.py"
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


IN_THEIR_PROCESS = """
import exo, exo_llama_cpp
assert exo.theirs and exo.worker.theirs
exo_llama_cpp.extend()
exo_llama_cpp.extend()
from exo.chat.output.registry import output_format
from exo.worker.protocol.wire import encode
from exo.worker.router import route
assert exo.__path__[0] != exo.__path__[-1] and len(exo.__path__) == 2
import sys
assert "llama_cpp" not in sys.modules
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter that has the wheel, a package ``exo`` of someone else's, and the wheel's requirements."""
    venv.create(tmp_path / "env")
    [packages] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (packages / "requirements.pth").write_text(f"{distribution('pydantic').locate_file('')}\n")
    (packages / "exo" / "worker").mkdir(parents=True)
    for folder in (packages / "exo", packages / "exo" / "worker"):
        (folder / "__init__.py").write_text("theirs = True\n")
    (packages / "exo" / "__init__.py").write_text("theirs = True\nimport exo.worker\n")
    interpreter = tmp_path / "env" / "bin" / "python"
    install = ["--python", str(interpreter), "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([sys.executable, "-m", "pip", *install, pack(tmp_path)], check=True)
    return interpreter


def test_it_answers_beside_another_package_exo(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    subprocess.run([python, "-c", IN_THEIR_PROCESS], cwd=tmp_path, check=True)
    table = {**gguf_table(tmp_path), "n_ctx": 256, "slots": 1}
    with Program((str(python), "-m", "exo_llama_cpp")) as program:
        program.load(Load(model_id="me/tiny", backend="LlamaCppCpu", table=table))
        [result] = program.generate(ask("one", max_tokens=4))
    assert len(result.tokens) == 4


def test_it_is_the_same_whenever_it_is_packed(tmp_path: Path) -> None:
    assert pack(tmp_path / "a").read_bytes() == pack(tmp_path / "b").read_bytes()
