"""Completion of model names, as a real bash, zsh or fish does it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.support.server import environment, write_card
from tests.support.terminal import Terminal

COMPLETE = """
PATH=$1:$PATH
_EXO_COMPLETE=source_bash exo > "$1/completion.bash"
. "$1/completion.bash"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_exo_completion exo
printf '%s\\n' "${COMPREPLY[@]}"
"""


ZSH = """
autoload -U compinit && compinit -u -D
eval "$(_EXO_COMPLETE=source_zsh exo)"
shown() { print -r -- "[$BUFFER]" }
zle -N shown
bindkey '^T' shown
print loa""ded
"""
"""Ctrl-T prints the line that is being edited."""
FISH = "_EXO_COMPLETE=source_fish exo | source; complete -C $argv[1]"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with models whose names have a colon, and with the program ``exo``."""
    for name in ("a1", "a2", "b"):
        write_card(tmp_path, name, {"cuda": {}}, aliases=[f"twin:{name}"])
    program = tmp_path / "exo"
    start = "import sys; sys.argv[0] = 'exo'; from exo.cli import main; main()"
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", start])} "$@"\n')
    program.chmod(0o755)
    return tmp_path


def completions(home: Path, *words: str) -> list[str]:
    """What bash would put in place of the last of its words."""
    command = ["bash", "-c", COMPLETE, "bash", str(home), "exo", *words]
    done = subprocess.run(command, env=environment(home), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["run", "twin:a"], ["twin:a1", "twin:a2"]),
        (["run", "twin", ":", "a"], ["a1", "a2"]),
        (["run", "twin", ":"], ["a1", "a2", "b"]),
        (["run", "twin"], ["twin:a1", "twin:a2", "twin:b"]),
        (["run", "twin", ":", "b", "@"], []),
        (["dooc"], []),
        (["doc"], ["doctor"]),
    ],
)
def test_a_model_name_with_a_colon_is_completed_in_bash(home: Path, words: list[str], found: list[str]) -> None:
    assert sorted(completions(home, *words)) == found


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("run twin:a", ["twin:a1", "twin:a2"]),
        ("run twin:", ["twin:a1", "twin:a2", "twin:b"]),
        ("show test/", ["test/a1", "test/a2", "test/b"]),
        ("dooc", []),
        ("doct", ["doctor"]),
    ],
)
def test_a_model_name_with_a_colon_is_completed_in_fish(home: Path, line: str, found: list[str]) -> None:
    variables = {**environment(home), "PATH": f"{home}:{os.environ['PATH']}", "XDG_CONFIG_HOME": str(home)}
    command = ["fish", "--no-config", "-c", FISH, f"exo {line}"]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert [answer.partition("\t")[0] for answer in done.stdout.splitlines()] == found


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_a_model_name_with_a_colon_is_completed_in_zsh(home: Path) -> None:
    path = f"{home}:{os.environ['PATH']}"
    with Terminal(home, "-f", "-i", program=("zsh",), PATH=path, PS1="> ") as zsh:
        zsh.wait_for("> ")
        zsh.keys(ZSH.strip().replace("\n", "; ") + "\n")
        zsh.wait_for("\nloaded\n")
        for line, whole in (("run twin:b", "run twin:b "), ("run twi", "run twin:"), ("doct", "doctor ")):
            zsh.keys(f"exo {line}\t\x14")
            zsh.wait_for(re.escape(f"[exo {whole}]"))
            zsh.keys("\x15")
        zsh.keys("exo run twin:a\t\t")
        zsh.wait_for("twin:a1 +twin:a2")
