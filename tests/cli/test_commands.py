"""The command line as its users see it: real processes, their output and exit codes."""

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import JsonValue

from exo.exit_code import ExitCode
from tests.support.api_server import CHAT_TEMPLATE
from tests.support.server import ServeProgram, environment, without_vllm, write_card
from tests.support.tiny import Shape, write_gguf


def exo(
    home: Path, *arguments: str, typed: str | None = None, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """``typed`` is piped in."""
    command = [python, "-m", "exo", *arguments]
    return subprocess.run(
        command,
        env=environment(home),
        input=typed,
        stdin=subprocess.DEVNULL if typed is None else None,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_exo_alone_serves_and_names_the_variables_that_have_no_effect_here(tmp_path: Path) -> None:
    upstreams = {"EXO_MEMORY_THRESHOLD": "0.8", "OVERRIDE_MEMORY_MB": "1000", "EXO_PORT": "0"}
    server = subprocess.Popen(
        [sys.executable, "-m", "exo"],
        env={**environment(tmp_path), **upstreams},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[4]
        assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
    finally:
        server.terminate()
        _, log = server.communicate(timeout=60)
    warnings = [line for line in log.splitlines() if "no effect here" in line]
    assert len(warnings) == 1
    assert warnings[0].endswith(": EXO_MEMORY_THRESHOLD, OVERRIDE_MEMORY_MB")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_home(tmp_path)
    return tmp_path


def write_home(home: Path) -> None:
    write_gguf(home / "tiny.gguf", Shape())
    table: dict[str, JsonValue] = {"path": str(home / "tiny.gguf"), "n_ctx": 1024, "threads": 1}
    write_card(home, "tiny", {"cuda": {**table, "chat_template": CHAT_TEMPLATE}})
    write_card(home, "absent", {"cuda": {"repo": "org/model", "file": "*.gguf"}})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_home(home)
    with ServeProgram(home) as server:
        yield server


def has_ipv6_loopback() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def at(server: ServeProgram) -> tuple[str, str]:
    return "--port", str(httpx.URL(server.url).port)


@pytest.mark.parametrize(
    ("arguments", "light"),
    [
        (["--help"], ["rich.markdown", "pydantic", "httpx", "anyio", "fastapi"]),
        (["list"], ["fastapi", "uvicorn", "jinja2", "llguidance"]),
        (["ps"], ["uvicorn", "huggingface_hub", "jinja2", "llguidance", "exo.worker.supervisor.pool"]),
        (["serve", "--help"], ["huggingface_hub", "httpx"]),
    ],
)
def test_a_command_imports_no_engine_and_nothing_else_that_it_has_no_use_for(
    home: Path, arguments: list[str], light: list[str]
) -> None:
    heavy = {"llama_cpp", "mlx", "numpy", "torch", *light}
    code = (
        "import sys, exo.cli\ntry:\n    exo.cli.app(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print(sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment(home), capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_help_tells_what_an_exit_status_means_and_how_the_shell_completes(home: Path) -> None:
    shown = exo(home, "--help").stdout
    for code in ExitCode:
        assert re.search(rf"^ +{code.value}  +\w", shown, re.M), code
    assert "--install-completion" in shown


def test_the_shell_completes_commands_and_models(home: Path) -> None:
    def complete(*words: str) -> list[str]:
        variables = {
            "_EXO_COMPLETE": "complete_bash",
            "COMP_WORDS": "\n".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        command = [Path(sys.executable).with_name("exo")]
        done = subprocess.run(
            command, env={**environment(home), **variables}, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert complete("exo", "co") == ["convert", "compare"]
    assert complete("exo", "show", "ti") == ["tiny"]
    assert complete("exo", "chat", "test/") == ["test/absent", "test/tiny"]


def test_run_starts_a_runner_itself_when_no_server_is_up(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free_port = str(taken.getsockname()[1])
    done = exo(
        home, "run", "tiny", "once upon", "--raw", "--max-tokens", "12", "--temperature", "0", "--port", free_port
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 5


def test_run_goes_through_the_server_that_is_up(server: ServeProgram) -> None:
    home = server.log.parent
    done = exo(home, "run", "tiny", "once upon", "--max-tokens", "12", "--temperature", "0", *at(server))
    assert done.returncode == 0, done.stderr
    assert server.client.get("/ready").json()["models"] == ["test/tiny"]
    assert done.stdout == reply(server, "once upon") + "\n"
    refused = exo(home, "run", "tinny", "x", *at(server))
    assert refused.returncode == 3
    assert "did you mean" in refused.stderr
    assert refused.stdout == ""
    absent = exo(home, "run", "absent", "x", *at(server))
    assert (absent.returncode, absent.stdout) == (3, "")
    assert "`exo pull test/absent --runner cuda` fetches it" in absent.stderr


def reply(server: ServeProgram, *contents: str, **fields: JsonValue) -> str:
    """What the model says to the last of these messages, those before it the system's."""
    roles = [*["system"] * (len(contents) - 1), "user"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 12, **fields}
    return server.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_files_and_what_is_piped_in_are_part_of_the_prompt(server: ServeProgram) -> None:
    home = server.log.parent
    (home / "notes.txt").write_text("a note\n")
    options = ["--max-tokens", "12", "--temperature", "0", *at(server)]
    with_file = exo(home, "run", "tiny", "sum up", "--file", str(home / "notes.txt"), *options, typed="piped\n")
    assert with_file.stdout == reply(server, "sum up\n\nnotes.txt:\na note\n\npiped") + "\n"
    assert exo(home, "run", "tiny", *options, typed="piped\n").stdout == reply(server, "piped") + "\n"
    terse = exo(home, "run", "tiny", "hi", "--system", "be terse", "--stop", "\n", *options)
    assert terse.stdout == reply(server, "be terse", "hi", stop=["\n"]) + "\n"


def test_an_answer_follows_a_schema(server: ServeProgram) -> None:
    home = server.log.parent
    schema = {"properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    (home / "schema.json").write_text(json.dumps({"type": "object", **schema}))
    for raw in ([], ["--raw"]):
        done = exo(home, "run", "tiny", "x", "--json-schema", str(home / "schema.json"), *raw, *at(server))
        assert isinstance(json.loads(done.stdout)["a"], bool), done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to say: give a prompt, a --file, or pipe something in"),
        (["x", "--file", "nowhere.txt"], "--file: nowhere.txt cannot be read as text"),
        (["x", "--json-schema", "tiny.gguf"], "--json-schema: tiny.gguf cannot be read as text"),
        (["x", "--json-schema", "card.toml"], "--json-schema: card.toml is not JSON"),
        (["x", "--raw", "--system", "y"], "--system: not accepted together with --raw"),
        (["x", "--temperature", "3"], "'--temperature': "),
    ],
)
def test_what_cannot_be_run(home: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str) -> None:
    (home / "card.toml").write_text("a = 1")
    monkeypatch.chdir(home)
    done = exo(home, "run", "tiny", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def test_an_interrupted_answer_ends_with_its_own_status(tmp_path: Path) -> None:
    table: dict[str, JsonValue] = {"n_ctx": 1_000_000_000, "step_seconds": 0.001, "chat_template": CHAT_TEMPLATE}
    write_card(tmp_path, "endless", {"cuda": table}, backends=["LlamaCppCpu"])
    with (
        ServeProgram(tmp_path, fake=True) as server,
        subprocess.Popen(
            [sys.executable, "-m", "exo", "run", "endless", "x", *at(server)],
            env=environment(tmp_path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said


def test_list_names_every_model(home: Path) -> None:
    done = exo(home, "list", "--json")
    models = {entry["model_id"]: entry for entry in json.loads(done.stdout)}
    assert models["test/tiny"]["aliases"] == ["tiny"]
    assert "google/gemma-3-270m" in models
    assert "test/tiny" in exo(home, "list").stdout


def test_show_tells_the_context_and_memory_that_a_model_would_use(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_card(home, "auto", {"cuda": {"path": str(home / "tiny.gguf"), "n_ctx": "auto"}})
    (engine,) = json.loads(exo(home, "show", "auto", "--json").stdout)["engines"]
    assert engine["plan"]["settings"]["n_ctx"] == Shape().context_length
    assert engine["plan"]["memory"]["memory"] > (home / "tiny.gguf").stat().st_size
    assert engine["plan"]["context_length"] == engine["plan"]["trained_length"] == Shape().context_length
    assert engine["plan"]["limit"] == "the trained length"
    assert f"{Shape().context_length:,} tokens: the trained length" in exo(home, "show", "auto").stdout
    monkeypatch.setenv("EXO_MEMORY_LIMIT", "100KB")
    (refused,) = json.loads(exo(home, "show", "auto", "--json").stdout)["engines"]
    assert "memory" in refused["plan"]["problem"]
    assert json.loads(exo(home, "show", "absent", "--json").stdout)["engines"][0]["plan"] is None


def test_route_explains_and_refuses(home: Path) -> None:
    done = exo(home, "route", "tiny")
    assert done.returncode == 0
    assert "runner cuda, backend LlamaCppC" in done.stdout
    assert json.loads(exo(home, "route", "tiny@cuda", "--json").stdout)["runner"] == "cuda"
    assert exo(home, "route", "tinny").returncode == 3
    write_card(home, "adapted", {"cuda": {"path": "tiny.gguf", "lora": [{"name": "sql", "path": "sql.gguf"}]}})
    assert "adapted:sql -> runner cuda" in exo(home, "route", "adapted:sql").stdout
    absent = exo(home, "route", "adapted:other")
    assert (absent.returncode, "has no adapter 'other'; it has sql" in absent.stderr) == (3, True)
    refused = exo(home, "route", "tiny@quantum")
    assert refused.returncode == 1
    assert "quantum" in refused.stderr
    assert "cuda" in refused.stderr


def test_doctor_names_the_engine_and_what_it_can_use(home: Path) -> None:
    python = without_vllm(home)
    done = exo(home, "doctor", python=python)
    assert done.returncode == 0
    assert "llama.cpp 0.3.36" in done.stdout
    assert "LlamaCppCpu" in done.stdout
    report = json.loads(exo(home, "doctor", "--json", python=python).stdout)
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


@pytest.mark.skipif(not has_ipv6_loopback(), reason="this machine has no IPv6 loopback address")
@pytest.mark.parametrize("host", ["localhost", "::"])
def test_one_server_listens_on_ipv4_and_ipv6(tmp_path: Path, host: str) -> None:
    with ServeProgram(tmp_path, "--host", host, "--insecure") as server:
        port = httpx.URL(server.url).port
        for address in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{address}:{port}/health", timeout=60).json() == {"status": "ok"}
        assert httpx.get(f"{server.url}/health", timeout=60).json() == {"status": "ok"}
