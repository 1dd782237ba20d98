"""``exo service``. systemd is not process 1 here, so a stand-in for ``systemctl`` records what it is asked."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.nvidia_driver import exo

ASKED = "asked"
SYSTEMCTL = """#!/bin/sh
echo "$@" >> {asked}
[ "$2" != is-system-running ] || echo {state}
"""


def host(tmp_path: Path, state: str = "running") -> Mapping[str, str]:
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(SYSTEMCTL.format(asked=tmp_path / ASKED, state=state))
    program.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    return {**env, "PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(tmp_path / "home")}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("scope", [(), ("--system",)])
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path, scope: tuple[str, ...]) -> None:
    shown = exo("service", "install", *scope, "--print", "--", "--load", "a b%n", env=host(tmp_path))
    assert shown.returncode == 0, shown.stderr
    unit = tmp_path / "exo.service"
    unit.write_text(shown.stdout)
    analyze = ["systemd-analyze", *(() if scope else ("--user",)), "verify", str(unit)]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(analyze, env=env, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_the_unit_starts_the_server_with_the_given_options(tmp_path: Path) -> None:
    unit = exo("service", "install", "--print", "--", "--load", 'a "b" $c', env=host(tmp_path)).stdout
    found = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert found is not None
    assert shlex.split(found[1]) == [sys.executable, "-m", "exo", "serve", "--load", 'a "b" $$c']
    assert not (tmp_path / "home").exists()


def test_it_is_installed_started_and_removed(tmp_path: Path) -> None:
    env = host(tmp_path)
    unit = tmp_path / "home" / ".config" / "systemd" / "user" / "exo.service"
    installed = exo("service", "install", "--", "--load", "gemma-3-270m", env=env)
    assert installed.returncode == 0, installed.stderr
    assert "journalctl --user -u exo.service" in installed.stdout
    assert "--load" in unit.read_text()
    assert exo("service", "status", env=env).returncode == 0
    assert exo("service", "remove", env=env).returncode == 0
    assert not unit.exists()
    assert (tmp_path / ASKED).read_text().splitlines() == [
        "--user is-system-running",
        "--user daemon-reload",
        "--user enable exo.service",
        "--user restart exo.service",
        "--user status --no-pager exo.service",
        "--user disable --now exo.service",
        "--user daemon-reload",
    ]
    again = exo("service", "remove", env=env)
    assert (again.returncode, again.stderr) == (1, f"exo: {unit} does not exist\n")


def test_without_systemd_nothing_is_written(tmp_path: Path) -> None:
    refused = exo("service", "install", env=host(tmp_path, state="offline"))
    assert (refused.returncode, refused.stderr) == (1, "exo: systemd does not run here: offline\n")
    assert not (tmp_path / "home").exists()
    absent = exo("service", "install", env={**host_without_programs(tmp_path)})
    assert (absent.returncode, absent.stderr) == (1, "exo: systemctl does not start: No such file or directory\n")


def host_without_programs(tmp_path: Path) -> Mapping[str, str]:
    return {"PATH": str(tmp_path / "none"), "HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}


def test_an_action_that_there_is_not_is_named(tmp_path: Path) -> None:
    refused = exo("service", "start", env=host(tmp_path))
    assert (refused.returncode, refused.stderr) == (2, "exo: expected install, status or remove (got 'start')\n")
