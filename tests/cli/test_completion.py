"""Completion of model names, as a real bash does it."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.support.server import environment, write_card

COMPLETE = """
PATH=$1:$PATH
_EXO_COMPLETE=source_bash exo > "$1/completion.bash"
. "$1/completion.bash"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_exo_completion exo
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completions(home: Path, *words: str) -> list[str]:
    """What bash would put in place of the last of its words."""
    program = home / "exo"
    start = "import sys; sys.argv[0] = 'exo'; from exo.cli import main; main()"
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", start])} "$@"\n')
    program.chmod(0o755)
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
def test_a_model_name_with_a_colon_is_completed(tmp_path: Path, words: list[str], found: list[str]) -> None:
    for name in ("a1", "a2", "b"):
        write_card(tmp_path, name, {"cuda": {}}, aliases=[f"twin:{name}"])
    assert sorted(completions(tmp_path, *words)) == found
