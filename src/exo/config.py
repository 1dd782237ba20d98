"""Settings: a flag beats the environment, which beats the default. Nothing else in exo reads the environment."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 52415


class SettingsError(ValueError):
    """A flag or an environment variable has a value that cannot be used; the message names it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line and the environment decide. Directories are absolute and need not exist."""

    host: str
    port: int
    """0 asks the system for a free port."""
    models_directory: Path
    """Where models are stored."""
    models_directories: tuple[Path, ...]
    """Where models are looked for, in this order: read-only directories, ``models_directory``, the others."""
    cards_directory: Path
    """The user's own model cards."""
    log_directory: Path
    """One log file for each runner."""

    @classmethod
    def load(
        cls,
        *,
        host: str | None = None,
        port: int | str | None = None,
        models_directory: Path | str | None = None,
    ) -> "Settings":
        """Settings from the flags ``--host``, ``--port`` and ``--models-dir``, where given, and the environment.

        An empty environment variable counts as unset. Raises SettingsError.
        """
        data = _base_directory("XDG_DATA_HOME", ".local/share")
        cache = _base_directory("XDG_CACHE_HOME", ".cache")
        given = _given("--models-dir", models_directory, "EXO_DEFAULT_MODELS_DIR")
        models = _directory(given) if given else data / "models"
        others = _directories("EXO_MODELS_DIRS")
        read_only = _directories("EXO_MODELS_READ_ONLY_DIRS")
        return cls(
            host=_host(_given("--host", host, "EXO_HOST")),
            port=_port(_given("--port", port, "EXO_PORT")),
            models_directory=models,
            models_directories=tuple(dict.fromkeys((*read_only, models, *others))),
            cards_directory=data / "custom_model_cards",
            log_directory=cache / "exo_log" / "runner_log",
        )


@dataclass(frozen=True, slots=True)
class _Given:
    """A value and the flag or variable that it came from."""

    source: str
    value: str

    def error(self, expected: str) -> SettingsError:
        return SettingsError(f"{self.source}: {expected} (got {self.value!r})")


def _variable(name: str) -> _Given | None:
    value = os.environ.get(name, "")
    return _Given(name, value) if value else None


def _given(flag: str, value: int | str | Path | None, variable: str) -> _Given | None:
    return _variable(variable) if value is None else _Given(flag, str(value))


def _host(given: _Given | None) -> str:
    if given is None:
        return DEFAULT_HOST
    if not given.value or any(character.isspace() or character == "/" for character in given.value):
        raise given.error("expected a host name or address, such as 127.0.0.1")
    return given.value


def _port(given: _Given | None) -> int:
    if given is None:
        return DEFAULT_PORT
    if not (given.value.isdecimal() and len(given.value) <= 5 and int(given.value) <= 65535):
        raise given.error("expected a port from 0 to 65535, where 0 is any free one")
    return int(given.value)


def _base_directory(variable: str, below_home: str) -> Path:
    """Upstream's rule: EXO_HOME holds everything; else the XDG directories, and outside Linux ``~/.exo``.

    Source: XDG Base Directory Specification 0.8, by which a relative path is invalid.
    """
    if home := _variable("EXO_HOME"):
        return _home() / _directory(home, relative_to=_home())
    if sys.platform != "linux":
        return _home() / ".exo"
    if given := _variable(variable):
        if not os.path.isabs(given.value):
            raise given.error("expected an absolute path")
        return _directory(given) / "exo"
    return _home() / below_home / "exo"


def _directories(variable: str) -> tuple[Path, ...]:
    given = _variable(variable)
    return tuple(_directory(_Given(variable, part)) for part in given.value.split(":") if part) if given else ()


def _directory(given: _Given, relative_to: Path | None = None) -> Path:
    try:
        path = (relative_to or Path.cwd()) / Path(given.value).expanduser()
    except RuntimeError as error:
        raise given.error("the home directory that ~ stands for is unknown") from error
    if not given.value or os.path.isfile(path):
        raise given.error("expected a directory")
    return path


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise SettingsError("HOME: your home directory is unknown; set HOME or EXO_HOME") from error
