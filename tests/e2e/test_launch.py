"""``exo launch`` with the real programs, as far as they are on this machine, against scripted models.

A program that is not there is skipped by name. Each has a home of its own.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from pydantic import JsonValue

from exo.cli.launch.programs import PROGRAMS
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import write_scripted

CONTEXT = 200_000
"""The twins' vocabulary is so small that a prompt has several times as many tokens as usual."""
SAID = ("Hello", " from", " exo")
DONE = ("The", " file", " is", " there")
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% set ends = {true: '\t', false: '\n'} %}"
    "{% set answered = messages | selectattr('role', 'equalto', 'tool') | list | length > 0 %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ ends[answered] }}{% endif %}"
)
"""After the result of a call, the prompt ends in the way to which the twin replies with its second text."""


OWN = {
    "claude": (".claude/settings.json", '{"model": "haiku", "outputStyle": "other"}'),
    "codex": (".codex/config.toml", 'model = "other"\nmodel_provider = "oss"\n'),
    "opencode": (".config/opencode/opencode.json", '{"model": "openai/other"}'),
    "qwen": (".qwen/settings.json", '{"model": {"name": "other"}}'),
    "cline": (".cline/data/settings/providers.json", '{"version": 1, "lastUsedProvider": "other", "providers": {}}'),
    "pi": (".pi/agent/settings.json", '{"defaultProvider": "openai", "defaultModel": "other"}'),
    "aider": (".aider.conf.yml", "model: openai/other\n"),
}
"""A file of the user's that configures the program otherwise, each with the word "other"."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How a program answers one prompt and ends, and the call by which its model makes a file; empty if it has none."""

    ask: tuple[str, ...]
    tool: str = ""
    arguments: str = ""


TRIALS = {
    "claude": Trial(("-p", "{}", "--allowedTools", "Bash"), "Bash", '{"command": "touch made", "description": "x"}'),
    "codex": Trial(
        ("exec", "--skip-git-repo-check", "--sandbox", "danger-full-access", "{}"),
        "exec_command",
        '{"cmd": "touch made"}',
    ),
    "opencode": Trial(("run", "{}"), "bash", '{"command": "touch made", "description": "x"}'),
    "qwen": Trial(("--yolo", "-p", "{}"), "run_shell_command", '{"command": "touch made", "is_background": false}'),
    "cline": Trial(("{}",), "run_commands", '{"commands": ["touch made"]}'),
    "pi": Trial(("-p", "{}"), "bash", '{"command": "touch made"}'),
    "aider": Trial(("--no-git", "--yes-always", "--no-check-update", "--analytics-disable", "--message", "{}")),
}
CALLERS = [name for name, trial in TRIALS.items() if trial.tool]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    scripts: dict[str, tuple[str, ...]] = {"talk": SAID}
    for name in CALLERS:
        trial = TRIALS[name]
        call = f'{{"name": "{trial.tool}", "arguments": {trial.arguments}}}'
        scripts[f"calls-{name}"] = ("<tool_call>\n", call, "\n</tool_call>")
    for name, pieces in scripts.items():
        write_scripted(home / f"{name}.gguf", pieces, DONE)
        table: dict[str, JsonValue] = {
            "path": str(home / f"{name}.gguf"),
            "n_ctx": CONTEXT,
            "slots": 1,
            "chat_template": TEMPLATE,
        }
        write_card(home, name, {"cuda": table}, backends=["LlamaCppCpu"])
    with ServeProgram(home) as server:
        yield server


def launched(server: ServeProgram, home: Path, *arguments: str) -> str:
    """The output of ``exo launch`` in an empty directory and with an empty home."""
    port = server.url.rpartition(":")[2]
    known = {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ}
    (work := home / "work").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "exo", "launch", "--port", port, *arguments],
        env={**known, "HOME": str(home), "EXO_HOME": str(home / "exo"), "COLUMNS": "200", "NO_COLOR": "1"},
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs(name: str) -> None:
    if shutil.which(PROGRAMS[name].command) is None:
        pytest.skip(f"{PROGRAMS[name].title} is not on this machine ({PROGRAMS[name].install})")


@pytest.mark.parametrize("name", TRIALS)
def test_a_program_answers_and_its_users_settings_stay(server: ServeProgram, tmp_path: Path, name: str) -> None:
    needs(name)
    path, text = OWN[name]
    own = tmp_path / path
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text(text)
    ask = [each.format("Say hello") for each in TRIALS[name].ask]
    assert "".join(SAID) in launched(server, tmp_path, name, "--model", "talk", "--", *ask)
    kept = own.read_text()  # some programs add the version of their format
    assert "other" in kept
    assert "talk" not in kept


@pytest.mark.parametrize("name", CALLERS)
def test_a_program_runs_the_call_of_its_model(server: ServeProgram, tmp_path: Path, name: str) -> None:
    needs(name)
    ask = [each.format("Make a file") for each in TRIALS[name].ask]
    output = launched(server, tmp_path, name, "--model", f"calls-{name}", "--", *ask)
    assert (tmp_path / "work" / "made").exists(), output
    assert "".join(DONE) in output


def test_open_webui_chats_with_the_model_that_it_offers_first(server: ServeProgram, tmp_path: Path) -> None:
    needs("open-webui")
    own = server.url.rpartition(":")[2]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    known = {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ}
    offline = {"OFFLINE_MODE": "true", "RAG_EMBEDDING_ENGINE": "openai", "WEBUI_SECRET_KEY": "0" * 32}
    (data := tmp_path / "data").mkdir()
    command = [sys.executable, "-m", "exo", "launch", "--port", own, "open-webui", "--model", "talk", "--"]
    with (log := tmp_path / "log").open("wb") as output:
        program = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env={**known, **offline, "HOME": str(tmp_path), "EXO_HOME": str(tmp_path / "exo"), "DATA_DIR": str(data)},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            wait_until_up(client, program, log)
            person = {"name": "a", "email": "a@example.com", "password": "correct horse"}
            token = client.post("/api/v1/auths/signup", json=person).json()["token"]
            client.headers["authorization"] = f"Bearer {token}"
            listed = [each["id"] for each in client.get("/api/models").json()["data"]]
            first = client.get("/api/config").json()["default_models"]
            assert first in listed
            body = {"model": first, "messages": [{"role": "user", "content": "Say hello"}]}
            whole = client.post("/api/chat/completions", json={**body, "stream": False}).json()
            assert whole["choices"][0]["message"]["content"] == "".join(SAID)
            with client.stream("POST", "/api/chat/completions", json={**body, "stream": True}) as reply:
                chunks = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
            assert [each["choices"][0]["delta"].get("content") for each in chunks][1:-1] == list(SAID)
    finally:
        os.killpg(program.pid, signal.SIGTERM)
        program.wait(60)


def wait_until_up(client: httpx.Client, program: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert program.poll() is None, log.read_text()
        with suppress(httpx.HTTPError):
            if client.get("/health").status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError(log.read_text())
