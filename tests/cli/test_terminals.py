"""Commands whose streams, locale or arguments are not as usual."""

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import JsonValue

from exo.cli import COMMANDS as COMMAND_NAMES
from exo.worker.supervisor.host_probe import probe_host
from tests import ROOT
from tests.support.server import environment, without_vllm, write_card
from tests.support.tiny import write_scripted


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_card(tmp_path, "long", {"cuda": {}}, model_id=f"test/{'long-' * 30}", aliases=["long", "x" * 100])
    return tmp_path


def exo(
    home: Path, *arguments: str | bytes, shell: str = "", python: str = sys.executable, **variables: str
) -> tuple[int, bytes, bytes]:
    """Exit status, output and standard error. ``shell`` is what follows the command."""
    command: Sequence[str | bytes] = ["sh", "-c", f'exec "$@" {shell}', "sh", python, "-m", "exo", *arguments]
    env = {**environment(home), "EXO_OFFLINE": "1", **variables}
    del env["COLUMNS"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["list", "--json"], ["--help"]])
def test_a_full_disk_behind_standard_output_is_told_in_one_line(home: Path, arguments: list[str]) -> None:
    status, _, error = exo(home, *arguments, shell="> /dev/full")
    assert (status, error) == (1, b"exo: standard output cannot be written: No space left on device\n")
    assert exo(home, *arguments, shell="> /dev/full 2> /dev/full")[0] == 1


COMMANDS: dict[str, tuple[int, bool, list[str]]] = {
    "serve": (1, False, ["--port", "{taken}"]),
    "run": (3, False, ["nosuch", "hi"]),
    "chat": (0, True, ["long"]),
    "pull": (1, False, ["long"]),
    "list": (0, True, []),
    "show": (0, True, ["long"]),
    "add": (4, False, ["org/model"]),
    "rm": (3, False, ["long"]),
    "ps": (4, False, ["--port", "9"]),
    "top": (4, False, ["--port", "9"]),
    "stop": (4, False, ["long", "--port", "9"]),
    "route": (0, True, ["long"]),
    "doctor": (0, True, []),
    "launch": (2, False, ["nothing"]),
    "node": (0, False, []),  # ends with its input
    "setup": (2, False, ["nothing"]),
    "service": (2, False, ["nothing"]),
    "convert": (1, False, ["nosuch.gguf", "{home}/out"]),
    "compare": (1, False, ["long", "--engines", "cuda,cuda"]),
    "bench": (4, False, ["http://127.0.0.1:9", "--model", "long"]),
}
"""For each command: the exit status with these arguments, and whether the command writes to standard output."""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_every_command_is_tried() -> None:
    assert COMMANDS.keys() == set(COMMAND_NAMES)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_needs_its_streams_or_a_locale(home: Path, command: str) -> None:
    status, prints, arguments = COMMANDS[command]
    python = without_vllm(home)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [command, *(word.format(taken=port, home=home) for word in arguments)]
        assert exo(home, *words, shell="<&- >&-", python=python, **ASCII)[0] == status
        full, _, error = exo(home, *words, shell="> /dev/full", python=python, **ASCII)
        assert full == (1 if prints else status)
        assert error.endswith(b"exo: standard output cannot be written: No space left on device\n") == prints
        assert exo(home, *words, shell="2> /dev/full", python=python, **ASCII)[0] == status


def test_an_answer_comes_although_standard_error_is_full(home: Path) -> None:
    write_scripted(home / "scripted.gguf", ["xyz"])
    table: dict[str, JsonValue] = {"path": str(home / "scripted.gguf"), "n_ctx": 512, "threads": 1}
    write_card(home, "scripted", {"cuda": table}, backends=["LlamaCppCpu"])
    (home / "exo_log").write_text("")  # so that something has to be said
    assert exo(home, "run", "scripted", "hi", shell="2> /dev/full")[:2] == (0, b"xyz\n")


async def test_every_engine_is_probed_in_a_locale_of_ascii(home: Path) -> None:
    found = json.loads(exo(home, "doctor", "--json", **ASCII)[1])["runners"]
    usual = (await probe_host()).probes
    assert {name: each["installed"] for name, each in found.items()} == {
        name: each.installed for name, each in usual.items()
    }


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams_harm_no_command_and_no_probe(home: Path, closed: str) -> None:
    status, output, _ = exo(home, "doctor", shell=closed, python=without_vllm(home))
    assert status == 0
    assert b"LlamaCppCpu" in output or ">&-" in closed.replace("2>&-", "")


@pytest.mark.parametrize(
    "command", [["show"], ["run"], ["pull"], ["stop"], ["route"], ["serve", "--port", "0", "--load"]]
)
def test_an_argument_that_is_not_utf_8_is_refused_in_one_line(home: Path, command: list[str]) -> None:
    status, _, error = exo(home, *command, b"caf\xe9")
    assert status == 2
    assert error.startswith(b"exo: the arguments must be UTF-8: [")
    assert error.count(b"\n") == 1


def test_a_locale_without_a_character_gets_a_question_mark(home: Path) -> None:
    write_scripted(home / "scripted.gguf", ["\u00e9", "\u20ac", " xyz"])
    table: dict[str, JsonValue] = {"path": str(home / "scripted.gguf"), "n_ctx": 512, "threads": 1}
    write_card(home, "scripted", {"cuda": table}, backends=["LlamaCppCpu"])
    status, output, _ = exo(home, "run", "scripted", "hi", PYTHONIOENCODING="latin-1")
    assert (status, output) == (0, b"\xe9? xyz\n")


def test_a_table_in_a_pipe_has_one_whole_line_for_each_row(home: Path) -> None:
    _, output, _ = exo(home, "list")
    (row,) = [line for line in output.decode().splitlines() if "long-" in line]
    assert f"test/{'long-' * 30}" in row
    assert f"long, {'x' * 100}" in row


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("[::1]", "http://[::1]:9"),
        ("::1", "http://[::1]:9"),
        ("127.0.0.1:1", "http://127.0.0.1:9"),
        ("http://127.0.0.1:1/", "http://127.0.0.1:9"),
        (":1", "http://127.0.0.1:9"),
        ("localhost", "http://localhost:9"),
    ],
)
def test_a_host_may_be_written_as_for_ollama(home: Path, host: str, url: str) -> None:
    status, _, error = exo(home, "ps", "--port", "9", EXO_HOST=host)
    assert status == 4
    assert f"no server answers at {url} ".encode() in error
    if host.endswith((":1", ":1/")) and host != "::1":
        assert b":1 " in exo(home, "ps", EXO_HOST=host)[2]


@pytest.mark.parametrize("host", ["a..b", "1:2:3", "[::1", "[localhost]", "https://x", "a b", "x:99999", "x" * 70])
def test_a_host_that_cannot_be_is_refused_in_one_line(home: Path, host: str) -> None:
    status, _, error = exo(home, "ps", EXO_HOST=host)
    assert (status, error.count(b"\n")) == (2, 1)
    assert error.startswith(b"exo: EXO_HOST: expected ")
