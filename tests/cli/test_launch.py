"""``exo launch`` with a stand-in for a program, which asks the model as it was told."""

import socket
import stat
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from pydantic import JsonValue

from tests.support.server import ServeProgram, environment, write_card
from tests.support.tiny import write_scripted
from tests.support.tiny.tool_template import TEMPLATE

PROGRAM = f"""#!{sys.executable}
import json, re, sys, httpx
path = sys.argv[sys.argv.index("--extension") + 1]
told = json.loads(re.search(r"\\{{.*\\}}", open(path).read(), re.DOTALL)[0])
[model] = told["models"]
body = {{"model": model["id"], "messages": [{{"role": "user", "content": "hi"}}]}}
headers = {{"authorization": f"Bearer {{told['apiKey']}}"}}
reply = httpx.post(told["baseUrl"] + "/chat/completions", json=body, headers=headers, timeout=60).json()
print(path, model["contextWindow"], reply["choices"][0]["message"]["content"], sys.argv[-1])
sys.exit(7)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_scripted(home / "talk.gguf", ["Hello", " there"])
    for name, n_ctx in (("talk", 2048), ("small", 512)):
        table: dict[str, JsonValue] = {"path": str(home / "talk.gguf"), "n_ctx": n_ctx, "chat_template": TEMPLATE}
        write_card(home, name, {"cuda": table}, backends=["LlamaCppCpu"])
    program = home / "bin" / "pi"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Generator[ServeProgram]:
    with ServeProgram(home) as server:
        yield server


def launch(home: Path, *arguments: str, port: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "exo", "launch", "--port", port, *arguments],
        env={**environment(home), "PATH": str(home / "bin")},  # no other program is there
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def unused_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def port_of(server: ServeProgram) -> str:
    return server.url.rpartition(":")[2]


def test_a_program_asks_the_running_server(home: Path, server: ServeProgram) -> None:
    done = launch(home, "pi", "--model", "talk", "--", "last", port=port_of(server))
    path, context, *text, last = done.stdout.split()
    assert (context, " ".join(text), last, done.returncode) == ("2048", "Hello there", "last", 7), done.stderr
    assert not Path(path).exists()
    assert "context of" not in done.stderr


def test_without_a_server_it_asks_one_that_ends_with_it(home: Path) -> None:
    done = launch(home, "pi", "--model", "talk", port=unused_port())
    assert "Hello there" in done.stdout, done.stderr
    assert done.returncode == 7


def test_the_loaded_model_is_the_default(home: Path, server: ServeProgram) -> None:
    for model in ("talk", "small"):
        assert server.client.post("/v1/models/unload", json={"model": model}).status_code == 200
    none = launch(home, "pi", port=port_of(server))
    assert (none.returncode, "--model" in none.stderr) == (2, True)
    assert server.complete("talk", max_tokens=1).status_code == 200
    assert "Hello there" in launch(home, "pi", port=port_of(server)).stdout


def test_a_context_that_is_too_small_is_said_before_and_after(home: Path, server: ServeProgram) -> None:
    done = launch(home, "pi", "--model", "small", port=port_of(server))
    assert done.stderr.count("small has a context of 512 tokens here") == 2
    assert "n_ctx" in done.stderr


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("claude", ("export ANTHROPIC_MODEL=talk", "export CLAUDE_CODE_MAX_CONTEXT_TOKENS=2048", "\nclaude 'a b'")),
        ("codex", ("model_context_window=2048", "/v1", "'a b'")),
        ("opencode", ('"context": 2048', "\nopencode 'a b'")),
        ("qwen", ('"contextWindowSize": 2048', "QWEN_CODE_SYSTEM_SETTINGS_PATH=", "\nqwen 'a b'")),
        ("cline", ('"contextWindow": 2048', "--data-dir", "'a b'")),
        ("pi", ('"contextWindow": 2048', "--extension", "'a b'")),
        ("aider", ('"max_input_tokens": 2048', "--model openai/talk", "'a b'")),
        ("open-webui", ("export DEFAULT_MODELS=test/talk", "\nopen-webui serve 'a b'")),
    ],
)
def test_what_a_program_is_told_can_be_printed(
    home: Path, server: ServeProgram, program: str, told: tuple[str, ...]
) -> None:
    done = launch(home, program, "--model", "talk", "--print", "--", "a b", port=port_of(server))
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in told), done.stdout
    checked = subprocess.run(["sh", "-n"], input=done.stdout, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_what_cannot_be_launched_is_said(home: Path, server: ServeProgram) -> None:
    port = port_of(server)
    unknown = launch(home, "emacs", port=port)
    assert (unknown.returncode, "it knows claude, codex" in unknown.stderr) == (2, True)
    absent = launch(home, "aider", "--model", "talk", port=port)
    assert (absent.returncode, "pip install aider-chat" in absent.stderr) == (1, True)
    assert launch(home, "pi", "--model", "nothing", port=port).returncode == 3
    printed = launch(home, "pi", "--model", "talk", "--print", port=unused_port())
    assert (printed.returncode, "exo serve" in printed.stderr) == (4, True)
