"""Settings: a flag beats the environment, which beats the default. Nothing else in exo reads the environment."""

import ipaddress
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from exo.worker.protocol.runners import Prefer

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 52415
_KEY_LENGTH = 8
"""Characters that an API key has at least."""
_KEY = re.compile(rf"(?:([A-Za-z0-9_.-]{{1,64}}):)?([!-9;-~]{{{_KEY_LENGTH},512}})")
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,3})?) ?((?:[KMGT]i?)?B?)", re.IGNORECASE)
_UNITS = {"": 1} | {
    letter + i: base**power for power, letter in enumerate("KMGT", 1) for i, base in (("", 1000), ("I", 1024))
}
_HOST_PATTERN = re.compile(r"\*|[A-Za-z0-9_.-]{1,253}|[0-9a-fA-F:.]{2,45}")
_ORIGIN_PATTERN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s,]{1,255}")


class SettingsError(ValueError):
    """A flag or an environment variable has a value that cannot be used; the message names it."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that opens the server. ``name`` says whose it is; the key itself is in no message and no ``repr``."""

    name: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM form; without a key file the key is in the certificate's."""

    certificate: Path
    key: Path | None


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use the server, and how."""

    keys: tuple[ApiKey, ...] = ()
    """None: whoever reaches the server may use it."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names by which it may be addressed besides those that are always accepted; "*" is any."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may use it besides its own; "*" is any."""
    insecure: bool = False
    """Whether it may listen beyond this machine without a key."""
    tls: Tls | None = None

    @classmethod
    def load(
        cls,
        *,
        keys: Sequence[str] = (),
        key_file: Path | None = None,
        allowed_hosts: Sequence[str] = (),
        cors_origins: Sequence[str] = (),
        insecure: bool = False,
        certificate: Path | None = None,
        certificate_key: Path | None = None,
    ) -> "Access":
        """From the flags of ``exo serve``; keys that are not given so are in EXO_API_KEY. Raises SettingsError."""
        if certificate_key is not None and certificate is None:
            raise SettingsError("--ssl-keyfile: needs --ssl-certfile as well")
        return cls(
            keys=_keys(keys, key_file),
            allowed_hosts=_all_match("--allowed-host", allowed_hosts, _HOST_PATTERN, "a host name without a port"),
            cors_origins=_all_match("--cors-origin", cors_origins, _ORIGIN_PATTERN, "an origin: https://example.org"),
            insecure=insecure,
            tls=Tls(_file("--ssl-certfile", certificate), certificate_key and _file("--ssl-keyfile", certificate_key))
            if certificate is not None
            else None,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the server takes on, and how long it waits."""

    max_queue: int = 256
    """Sequences of one model that may wait for a slot."""
    drain_seconds: float = 30
    """How long running requests may go on when the server is told to stop."""
    stall_seconds: float = 60
    """How long a client may leave what it was sent unread."""
    memory: int | None = None
    """Bytes of the processors' memory that all models together may take; None is all but a margin."""
    keep_seconds: float = math.inf
    """How long a model stays loaded without being used, where its card does not say."""
    evict_seconds: float = 120
    """How long the requests of a model may keep others waiting for its memory; then they are put off."""
    residence_seconds: float = 10
    """How long a model at least stays loaded that takes turns with another in the same memory."""
    load_seconds: float = 300
    """How long loading a model may make no progress."""

    @classmethod
    def load(
        cls,
        *,
        max_queue: int | str | None = None,
        drain: float | str | None = None,
        stall: float | str | None = None,
        memory: int | str | None = None,
        ttl: float | str | None = None,
    ) -> "Limits":
        """From the flags ``--max-queue``, ``--drain-timeout``, ``--stall-timeout``, ``--memory-limit`` and ``--ttl``,
        where given, else from EXO_MAX_QUEUE, EXO_DRAIN_TIMEOUT, EXO_STALL_TIMEOUT, EXO_MEMORY_LIMIT and EXO_TTL. The
        environment alone has EXO_EVICT_TIMEOUT, EXO_MIN_RESIDENCE and EXO_LOAD_TIMEOUT. Times are in seconds. Raises
        SettingsError.
        """
        return cls(
            max_queue=_count(_given("--max-queue", max_queue, "EXO_MAX_QUEUE"), cls().max_queue),
            drain_seconds=_seconds(_given("--drain-timeout", drain, "EXO_DRAIN_TIMEOUT"), cls().drain_seconds),
            stall_seconds=_seconds(_given("--stall-timeout", stall, "EXO_STALL_TIMEOUT"), cls().stall_seconds),
            memory=_bytes(_given("--memory-limit", memory, "EXO_MEMORY_LIMIT")),
            keep_seconds=_seconds(_given("--ttl", ttl, "EXO_TTL"), cls().keep_seconds),
            evict_seconds=_seconds(_variable("EXO_EVICT_TIMEOUT"), cls().evict_seconds),
            residence_seconds=_seconds(_variable("EXO_MIN_RESIDENCE"), cls().residence_seconds),
            load_seconds=_seconds(_variable("EXO_LOAD_TIMEOUT"), cls().load_seconds),
        )


@dataclass(frozen=True, slots=True)
class HubAccess:
    """Where models are pulled from, and whether that is allowed."""

    endpoint: str | None = None
    """The hub's address; None is the one that huggingface_hub knows."""
    token: str | None = field(default=None, repr=False)
    """None is the token, if any, that `hf auth login` has stored."""
    offline: str | None = None
    """The variable that forbids the network, where one does."""

    @classmethod
    def load(cls) -> "HubAccess":
        """From HF_ENDPOINT, HF_TOKEN, EXO_OFFLINE and HF_HUB_OFFLINE. Raises SettingsError."""
        endpoint, token = _variable("HF_ENDPOINT"), _variable("HF_TOKEN")
        if endpoint is not None and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", endpoint.value):
            raise endpoint.error("expected an address: https://hub.example")
        if token is not None and not re.fullmatch(r"\s*[!-~]{1,4096}\s*", token.value):
            raise SettingsError("HF_TOKEN: expected printable ASCII characters without spaces")
        offline = (name for name in ("EXO_OFFLINE", "HF_HUB_OFFLINE") if _flag(_variable(name)))
        return cls(endpoint and endpoint.value.rstrip("/"), token and token.value.strip(), next(offline, None))


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
    access: Access = Access()
    limits: Limits = Limits()
    read_only_directories: tuple[Path, ...] = ()
    """Those of ``models_directories`` that are never written."""
    hub: HubAccess = HubAccess()
    auto_pull: bool = False
    """Whether the server pulls a model that is asked for and not on disk."""
    history_file: Path | None = None
    """What was typed in `exo chat`; None keeps nothing."""
    prefer: Prefer | None = None
    """What decides between runners that have loaded the same model, where its card does not say; None is its order."""
    speeds_file: Path | None = None
    """How fast runners were; None keeps nothing."""
    strict: bool = False
    """Whether the server refuses unknown fields of requests instead of warning of them."""

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        return is_loopback(self.host)

    def url(self, port: int | None = None) -> str:
        """Where the server is, at ``port`` if that is known better than from the settings."""
        scheme = "https" if self.access.tls is not None else "http"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port if port is None else port}"

    @classmethod
    def load(
        cls,
        *,
        host: str | None = None,
        port: int | str | None = None,
        models_directory: Path | str | None = None,
        access: Access | None = None,
        limits: Limits | None = None,
        auto_pull: bool = False,
        prefer: str | None = None,
        strict: bool = False,
    ) -> "Settings":
        """Settings from the flags ``--host``, ``--port``, ``--models-dir``, ``--auto-pull``, ``--prefer`` and
        ``--strict``, where given, and the environment.

        An empty environment variable counts as unset. Raises SettingsError.
        """
        data = _base_directory("XDG_DATA_HOME", ".local/share")
        cache = _base_directory("XDG_CACHE_HOME", ".cache")
        state = _base_directory("XDG_STATE_HOME", ".local/state")
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
            access=access or Access.load(),
            limits=limits or Limits.load(),
            read_only_directories=read_only,
            hub=HubAccess.load(),
            auto_pull=auto_pull or _flag(_variable("EXO_AUTO_PULL")),
            history_file=data / "chat_history",
            prefer=_prefer(_given("--prefer", prefer, "EXO_PREFER")),
            speeds_file=state / "speeds.json",
            strict=strict or _flag(_variable("EXO_STRICT")),
        )


def is_loopback(host: str) -> bool:
    """Whether a host name or address stands for this machine and no other."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


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


def _given(flag: str, value: float | str | Path | None, variable: str) -> _Given | None:
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


def _count(given: _Given | None, default: int) -> int:
    if given is None:
        return default
    if not (given.value.isdecimal() and len(given.value) <= 6):
        raise given.error("expected a number from 0 to 999999")
    return int(given.value)


def _seconds(given: _Given | None, default: float) -> float:
    if given is None:
        return default
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", given.value):
        raise given.error("expected seconds, such as 30 or 0.5")
    return float(given.value)


def _bytes(given: _Given | None) -> int | None:
    if given is None:
        return None
    match = _SIZE.fullmatch(given.value)
    if match is None or not (size := int(float(match[1]) * _UNITS[match[2].upper().removesuffix("B")])):
        raise given.error("expected a size, such as 12GiB, 12GB or a number of bytes")
    return size


def _flag(given: _Given | None) -> bool:
    value = given.value.lower() if given is not None else "false"
    if given is not None and value not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise given.error("expected true or false")
    return value in ("1", "true", "yes", "on")


def _prefer(given: _Given | None) -> Prefer | None:
    if given is None:
        return None
    for known in get_args(Prefer):
        if given.value == known:
            return known
    raise given.error(f"expected {' or '.join(get_args(Prefer))}")


def _keys(flags: Sequence[str], file: Path | None) -> tuple[ApiKey, ...]:
    """The keys of flags and file or, failing both, of the environment. A message about a key never holds it."""
    texts = [("--api-key", text) for text in flags]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise SettingsError(f"--api-key-file: {file} cannot be read: {error}") from error
        found = [(f"{file}, line {at}", line) for at, line in enumerate(lines, 1) if line and not line.startswith("#")]
        if not found:
            raise SettingsError(f"--api-key-file: {file} holds no key; expected one a line, as NAME:KEY or KEY")
        texts += found
    if not texts and (variable := _variable("EXO_API_KEY")):
        texts = [(variable.source, variable.value)]
    keys = [_key(source, text, at) for at, (source, text) in enumerate(texts, 1)]
    for what, values in (("name", [key.name for key in keys]), ("key", [key.key for key in keys])):
        if len(set(values)) < len(values):
            raise SettingsError(f"--api-key: the same {what} is given twice")
    return tuple(keys)


def _key(source: str, text: str, at: int) -> ApiKey:
    match = _KEY.fullmatch(text)
    if match is None:
        raise SettingsError(
            f"{source}: expected NAME:KEY or KEY, where KEY is {_KEY_LENGTH} to 512 printable ASCII characters"
            " without a colon or space"
        )
    return ApiKey(match[1] or f"key-{at}", match[2])


def _all_match(flag: str, values: Sequence[str], pattern: re.Pattern[str], expected: str) -> tuple[str, ...]:
    for value in values:
        if not pattern.fullmatch(value):
            raise _Given(flag, value).error(f"expected {expected}, or *")
    return tuple(values)


def _file(flag: str, path: Path) -> Path:
    if not path.is_file():
        raise _Given(flag, str(path)).error("expected a file")
    return path


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
