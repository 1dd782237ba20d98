"""The values of flags and environment variables: where each comes from, and what it may be."""

import ipaddress
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from exo.exit_code import CommandError, ExitCode

DEFAULT_HOST = "127.0.0.1"
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,3})?) ?((?:[KMGT]i?)?B?)", re.IGNORECASE)
_UNITS = {"": 1} | {
    letter + i: base**power for power, letter in enumerate("KMGT", 1) for i, base in (("", 1000), ("I", 1024))
}
_ADDRESS = re.compile(r"(?:\[([^\]]+)\]|([^\s/:@\[\]?#]*))(?::([0-9]{1,5}))?")
_T = TypeVar("_T")


class SettingsError(CommandError):
    """A flag or an environment variable has an invalid value; the message names both."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.USAGE)


@dataclass(frozen=True, slots=True)
class GivenValue:
    """A value and the flag or variable that it comes from."""

    source: str
    value: str

    def error(self, expected: str) -> SettingsError:
        """An error that names the source, what was expected and the value."""
        return SettingsError(f"{self.source}: {expected} (got {self.value!r})")


def from_environment(name: str) -> GivenValue | None:
    """The value of a variable. An empty one counts as unset."""
    value = os.environ.get(name, "")
    return GivenValue(name, value) if value else None


def value_of(
    flag: str, value: float | str | Path | None, variable: str, parse: Callable[[GivenValue], _T], default: _T
) -> _T:
    """The flag's value, else the variable's, else the default. Raises SettingsError."""
    given = from_environment(variable) if value is None else GivenValue(flag, str(value))
    return default if given is None else parse(given)


def as_address(given: GivenValue) -> tuple[str, int | None]:
    """Host and, if it has one, port: 127.0.0.1, [::1], ::1, localhost:8401, :8401, http://127.0.0.1:8401."""
    value = given.value.removeprefix("http://").removesuffix("/")
    if _is_address(value):
        return value, None
    match = _ADDRESS.fullmatch(value)
    try:
        if not value or match is None or (match[1] and not _is_address(match[1])):
            raise ValueError
        host = match[1] or match[2] or DEFAULT_HOST
        host.encode("idna")  # as the system's resolver does; it refuses a..b
    except ValueError:
        raise given.error("expected a host name or address, such as 127.0.0.1 or [::1]:8401") from None
    return host, as_port(GivenValue(given.source, match[3])) if match[3] else None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def as_port(given: GivenValue) -> int:
    """Raises SettingsError."""
    if not (given.value.isdecimal() and len(given.value) <= 5 and int(given.value) <= 65535):
        raise given.error("expected a port from 0 to 65535, where 0 is any free one")
    return int(given.value)


def as_count(given: GivenValue) -> int:
    """Raises SettingsError."""
    if not (given.value.isdecimal() and len(given.value) <= 6):
        raise given.error("expected a number from 0 to 999999")
    return int(given.value)


def as_seconds(given: GivenValue) -> float:
    """Raises SettingsError."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", given.value):
        raise given.error("expected seconds, such as 30 or 0.5")
    return float(given.value)


def as_size(given: GivenValue) -> int:
    """A number of bytes. Raises SettingsError."""
    match = _SIZE.fullmatch(given.value)
    if match is None or not (size := int(float(match[1]) * _UNITS[match[2].upper().removesuffix("B")])):
        raise given.error("expected a size, such as 12GiB, 12GB or a number of bytes")
    return size


def is_set(variable: str) -> bool:
    """Whether a variable says yes. Raises SettingsError."""
    given = from_environment(variable)
    if given is None or given.value.lower() in ("0", "false", "no", "off"):
        return False
    if given.value.lower() not in ("1", "true", "yes", "on"):
        raise given.error("expected true or false")
    return True


def matching(flag: str, values: Sequence[str], pattern: re.Pattern[str], expected: str) -> tuple[str, ...]:
    """The flag's values. Raises SettingsError if one does not match ``pattern``."""
    for value in values:
        if not pattern.fullmatch(value):
            raise GivenValue(flag, value).error(f"expected {expected}, or *")
    return tuple(values)


def as_file(flag: str, path: Path) -> Path:
    """The path of a file that exists. Raises SettingsError."""
    if not path.is_file():
        raise GivenValue(flag, str(path)).error("expected a file")
    return path


def base_directory(variable: str, below_home: str) -> Path:
    """Upstream's rule: EXO_HOME for everything, otherwise the XDG directories, or ``~/.exo`` outside Linux.

    A relative XDG path is invalid according to the XDG Base Directory Specification 0.8.
    """
    if home := from_environment("EXO_HOME"):
        return as_directory(home, relative_to=None if os.path.isabs(home.value) else home_directory())
    if sys.platform != "linux":
        return home_directory() / ".exo"
    if given := from_environment(variable):
        if not os.path.isabs(given.value):
            raise given.error("expected an absolute path")
        return as_directory(given) / "exo"
    return home_directory() / below_home / "exo"


def directories_in(variable: str) -> tuple[Path, ...]:
    """The directories that a variable lists, with colons between them. Raises SettingsError."""
    given = from_environment(variable)
    return tuple(as_directory(GivenValue(variable, part)) for part in given.value.split(":") if part) if given else ()


def directory_from(variable: str) -> Path | None:
    """The directory that a variable of another program names; None if it gives no absolute path."""
    given = from_environment(variable)
    path = os.path.expanduser(given.value) if given else ""
    return Path(path) if os.path.isabs(path) else None


def as_directory(given: GivenValue, relative_to: Path | None = None) -> Path:
    """An absolute path of a directory, which need not exist. Raises SettingsError."""
    try:
        path = Path(given.value).expanduser()
        if not path.is_absolute():
            path = (relative_to or Path.cwd()) / path
    except RuntimeError as error:
        raise given.error("~ stands for an unknown home directory") from error
    except FileNotFoundError as error:
        raise given.error("expected an absolute path, because the current directory does not exist any more") from error
    if not given.value or os.path.isfile(path):
        raise given.error("expected a directory")
    try:
        str(path).encode()  # the protocol with the runners is JSON
    except UnicodeEncodeError as error:
        raise given.error("expected a path in UTF-8") from error
    return path


def home_directory() -> Path:
    """The user's home directory. Raises SettingsError."""
    try:
        return as_directory(GivenValue("HOME", str(Path.home())))
    except RuntimeError as error:
        raise SettingsError("HOME: your home directory is unknown; set HOME or EXO_HOME") from error
