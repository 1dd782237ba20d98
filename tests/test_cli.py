"""The command line as its users see it: real processes, their output and exit codes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import ServeProgram, environment, write_card
from tests.tiny import Shape, write_gguf


def exo(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "exo", *arguments]
    return subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", Shape())
    write_card(tmp_path, "tiny", {"cuda": {"path": str(tmp_path / "tiny.gguf"), "n_ctx": 512, "threads": 1}})
    return tmp_path


def test_help_imports_no_engine_and_no_server() -> None:
    heavy = {"llama_cpp", "mlx", "numpy", "fastapi", "uvicorn", "pydantic"}
    code = f"import sys, exo.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_run_starts_a_runner_itself_when_no_server_is_up(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free_port = str(taken.getsockname()[1])
    done = exo(
        home, "run", "tiny", "once upon", "--raw", "--max-tokens", "12", "--temperature", "0", "--port", free_port
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 5


def test_run_goes_through_the_server_that_is_up(home: Path) -> None:
    with ServeProgram(home) as server:
        arguments = ["run", "tiny", "once upon", "--max-tokens", "12", "--temperature", "0"]
        done = exo(home, *arguments, "--port", server.url.rpartition(":")[2])
        assert done.returncode == 0, done.stderr
        assert server.client.get("/ready").json()["models"] == ["test/tiny"]
        refused = exo(home, "run", "tinny", "x", "--port", server.url.rpartition(":")[2])
    assert refused.returncode == 1
    assert "did you mean" in refused.stderr
    assert refused.stdout.strip() == ""


def test_list_names_every_model(home: Path) -> None:
    done = exo(home, "list", "--json")
    models = {entry["model_id"]: entry for entry in json.loads(done.stdout)}
    assert models["test/tiny"]["aliases"] == ["tiny"]
    assert "google/gemma-3-270m" in models
    assert "test/tiny" in exo(home, "list").stdout


def test_route_explains_and_refuses(home: Path) -> None:
    done = exo(home, "route", "tiny")
    assert done.returncode == 0
    assert "runner cuda, backend LlamaCppC" in done.stdout
    assert json.loads(exo(home, "route", "tiny@cuda", "--json").stdout)["runner"] == "cuda"
    refused = exo(home, "route", "tiny@quantum")
    assert refused.returncode == 1
    assert "quantum" in refused.stderr
    assert "cuda" in refused.stderr


def test_doctor_names_the_engine_and_what_it_can_use(home: Path) -> None:
    done = exo(home, "doctor")
    assert done.returncode == 0
    assert "llama.cpp 0.3.36" in done.stdout
    assert "LlamaCppCpu" in done.stdout
    report = json.loads(exo(home, "doctor", "--json").stdout)
    assert report["runners"]["cuda"]["installed"] is True
    assert report["memory_total"] > 0


def test_a_port_in_use_is_told_plainly(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = exo(home, "serve", "--port", port)
    assert done.returncode == 1
    assert f"port {port} on 127.0.0.1 is in use" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_setting_is_named(home: Path) -> None:
    done = exo(home, "serve", "--port", "http")
    assert done.returncode == 2
    assert "--port" in done.stderr
    assert "'http'" in done.stderr
