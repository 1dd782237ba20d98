"""``exo service``: runs ``exo serve`` under systemd, for the user or for the machine."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from exo.cli.console import say
from exo.exit_code import CommandError, ExitCode

_NAME = "exo.service"
_UNIT = """\
[Unit]
Description=exo: language models on one OpenAI-compatible endpoint

[Service]
ExecStart={command}
# For EXO_API_KEY and other settings, one NAME=value in a line.
EnvironmentFile=-%E/exo/environment
Restart=on-failure
RestartSec=2
# SIGTERM drains: running requests get 30 seconds, or what --drain-timeout says.
KillMode=mixed
TimeoutStopSec=90
{owner}
[Install]
WantedBy={target}
"""
_SYSTEM_USER = """\
DynamicUser=yes
StateDirectory=exo
CacheDirectory=exo
Environment=EXO_HOME=%S/exo HOME=%S/exo XDG_CACHE_HOME=%C/exo
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
"""


def service(
    action: Annotated[str, typer.Argument(help="install, status or remove.")],
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of exo serve, after --, such as -- --load MODEL.")
    ] = None,
    system: Annotated[
        bool, typer.Option("--system", help="For the machine, as a user of its own. Default: for you.")
    ] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the unit that install writes; change nothing.")] = False,
) -> None:
    """Run the server with systemd: started with the machine, again after a crash, with its log in the journal."""
    match action:
        case "install" if show:
            say(unit_text(options or (), system=system).rstrip())
        case "install":
            _install(unit_text(options or (), system=system), system=system)
        case "status":
            command = [*_systemctl(system=system), "status", "--no-pager", _NAME]
            raise typer.Exit(subprocess.run(command, check=False).returncode)
        case "remove":
            _remove(system=system)
        case _:
            raise CommandError(f"expected install, status or remove (got {action!r})", ExitCode.USAGE)


def unit_text(options: Sequence[str], *, system: bool) -> str:
    """The unit file of ``exo serve`` with these options."""
    command = [sys.executable, "-m", "exo", "serve", *options]
    return _UNIT.format(
        command=" ".join(map(_quoted, command)),
        owner=_SYSTEM_USER if system else "",
        target="multi-user.target" if system else "default.target",
    )


def _quoted(word: str) -> str:
    """A word of a command line in systemd's syntax, see systemd.service(5)."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _unit_file(*, system: bool) -> Path:
    if system:
        return Path("/etc/systemd/system") / _NAME
    configuration = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(configuration) / "systemd" / "user" / _NAME


def _install(unit: str, *, system: bool) -> None:
    file = _unit_file(system=system)
    _check(system=system)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(unit)
    except OSError as error:
        raise CommandError(f"{file} cannot be written: {error.strerror}") from error
    for words in (["daemon-reload"], ["enable", _NAME], ["restart", _NAME]):
        _run(*words, system=system)
    say(f"{file} is installed and the server is started")
    say(f"its log: journalctl {'' if system else '--user '}-u {_NAME}")
    if not system:
        say("it ends when you log out, unless you run once: loginctl enable-linger")


def _remove(*, system: bool) -> None:
    file = _unit_file(system=system)
    if not file.exists():
        raise CommandError(f"{file} does not exist")
    _run("disable", "--now", _NAME, system=system)
    file.unlink()
    _run("daemon-reload", system=system)
    say(f"{file} is removed")


def _check(*, system: bool) -> None:
    """Raises CommandError where systemd does not run, or could not start this exo."""
    try:
        done = subprocess.run([*_systemctl(system=system), "is-system-running"], capture_output=True, text=True)
    except OSError as error:
        raise CommandError(f"systemctl does not start: {error.strerror}") from error
    if done.stdout.strip() in ("", "offline", "unknown"):
        raise CommandError(f"systemd does not run here: {done.stderr.strip() or done.stdout.strip()}")
    folder = next((each for each in Path(sys.executable).parents if not each.stat().st_mode & 0o001), None)
    if system and folder is not None:
        raise CommandError(
            f"the service runs as a user of its own, and {folder} is closed to other users:"
            " install exo elsewhere, such as in /opt/exo, or leave out --system"
        )


def _run(*words: str, system: bool) -> None:
    """Raises CommandError."""
    command = [*_systemctl(system=system), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CommandError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}")


def _systemctl(*, system: bool) -> list[str]:
    return ["systemctl", *([] if system else ["--user"])]
