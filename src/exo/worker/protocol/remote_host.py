"""Other machines that run models: each is a command prefix that runs a program there with its pipes here. Pure."""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import ClassVar

LOCAL = "local"
"""The name of this machine, where a name is shown."""
HOST_RAM = "memory"
"""The name of another host's RAM in the memory budget, after the host's, as in "gpu2/memory"."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_SSH_OPTIONS = {
    "BatchMode": "yes",  # a question for a password would wait for ever
    "ConnectTimeout": "5",
    "ServerAliveInterval": "1",  # a host that is cut off is noticed at the third of these, within four seconds
    "ServerAliveCountMax": "2",
}


class HostsError(Exception):
    """The file of hosts cannot be used; the message names file, key and reason."""


@dataclass(frozen=True, slots=True)
class RemoteHost:
    """A machine of the file ``hosts.toml``."""

    name: str
    run: tuple[str, ...]
    """The command prefix."""
    python: str = sys.executable
    """The Python there that has exo."""
    address: str = ""
    """Where engines may talk to each other; without one, no model is divided onto this host."""

    def command(self, module: str, *arguments: str, label: str = "") -> tuple[str, ...]:
        """The command line that runs a module of exo there, see ``guard``. ``label`` marks its process."""
        words = (self.python, "-m", "exo.worker.guard", *(("--label", label) if label else ()), module, *arguments)
        if PurePath(self.run[0]).name != "ssh":
            return (*self.run, *words)
        given = " ".join(self.run)
        options = [f"-o{name}={value}" for name, value in _SSH_OPTIONS.items() if name not in given]
        return (self.run[0], "-T", *options, *self.run[1:], *map(shlex.quote, words))  # a shell reads the words there


@dataclass(slots=True)
class _HostEntry:
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    run: list[str] = field(default_factory=list[str])
    python: str = sys.executable
    address: str = ""


def read_hosts(file: Path) -> tuple[RemoteHost, ...]:
    """The hosts of a TOML file, in its order; none without the file. Raises ``HostsError``."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise HostsError(f"{file}: {error}") from error
    import tomllib

    from pydantic import TypeAdapter, ValidationError  # settings are also read before anything is installed

    from exo.worker.protocol.validation import describe

    try:
        entries = TypeAdapter(dict[str, _HostEntry]).validate_python(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise HostsError(f"{file}: not TOML: {error}") from error
    except ValidationError as error:
        key, reason = describe(error)
        raise HostsError(f"{file}: {key}: {reason}") from error
    return tuple(_hosts(file, entries))


def _hosts(file: Path, entries: Mapping[str, _HostEntry]) -> Iterator[RemoteHost]:
    for name, each in entries.items():
        if name == LOCAL or not _NAME.fullmatch(name):
            raise HostsError(f"{file}: [{name}]: a host's name has letters, digits, '_', '.' and '-', and is not local")
        yield RemoteHost(name, tuple(each.run) or ("ssh", name), each.python, each.address)


def account(host: str, device: str) -> str:
    """The name of a device's account in the memory budget: "CUDA0" here, "gpu2/CUDA0" on host gpu2."""
    return f"{host}/{device}" if host else device


def host_of(account: str) -> str:
    """The host of an account; empty for this machine."""
    return account.rpartition("/")[0]
