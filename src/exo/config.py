"""Settings: a flag overrides the environment, which overrides the default. No other module reads the environment."""

import ipaddress
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, get_args

from exo.exit_code import CommandError, ExitCode
from exo.worker.protocol.runners import Prefer

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 52415
_OWN_VARIABLES = (
    *("EXO_API_KEY", "EXO_AUTO_PULL", "EXO_CUDA_PLUGIN", "EXO_DEFAULT_MODELS_DIR", "EXO_DRAIN_TIMEOUT"),
    *("EXO_EVICT_TIMEOUT", "EXO_HOME", "EXO_HOST", "EXO_IDLE_TIMEOUT", "EXO_LOAD_TIMEOUT", "EXO_MAX_QUEUE"),
    *("EXO_MEMORY_LIMIT", "EXO_MIN_RESIDENCE", "EXO_MODELS_DIRS", "EXO_MODELS_READ_ONLY_DIRS", "EXO_OFFLINE"),
    *("EXO_PORT", "EXO_PREFER", "EXO_STALL_TIMEOUT", "EXO_STRICT", "EXO_TTL", "EXO_URL", "EXO_LAUNCH_KEY"),
)
"""The variables that exo or its documentation uses."""
_UPSTREAM_VARIABLES = ("ENABLE_DISAGGREGATION", "OVERRIDE_MEMORY_MB")
"""Upstream's variables without "EXO_"."""
_MIN_KEY_LENGTH = 8
_KEY = re.compile(rf"(?:([A-Za-z0-9_.-]{{1,64}}):)?([!-9;-~]{{{_MIN_KEY_LENGTH},512}})")
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,3})?) ?((?:[KMGT]i?)?B?)", re.IGNORECASE)
_UNITS = {"": 1} | {
    letter + i: base**power for power, letter in enumerate("KMGT", 1) for i, base in (("", 1000), ("I", 1024))
}
_HOST_PATTERN = re.compile(r"\*|[A-Za-z0-9_.-]{1,253}|[0-9a-fA-F:.]{2,45}")
_ADDRESS = re.compile(r"(?:\[([^\]]+)\]|([^\s/:@\[\]?#]*))(?::([0-9]{1,5}))?")
_ORIGIN_PATTERN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s,]{1,255}")
_T = TypeVar("_T")


class SettingsError(CommandError):
    """A flag or an environment variable has an invalid value; the message names both."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.USAGE)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key and its owner's name. The key itself never appears in a message or ``repr``."""

    name: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM format. Without a key file, the certificate file holds the key as well."""

    certificate: Path
    key: Path | None


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use the server."""

    keys: tuple[ApiKey, ...] = ()
    """Without keys, every client that reaches the server may use it."""
    allowed_hosts: tuple[str, ...] = ()
    """Accepted host names in addition to the built-in ones; "*" accepts any."""
    cors_origins: tuple[str, ...] = ()
    """Web origins that may use the server in addition to its own; "*" allows any."""
    insecure: bool = False
    """Whether the server may listen on the network without a key."""
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
        """From the flags of ``exo serve``, and EXO_API_KEY if no flag gives a key. Raises SettingsError."""
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
    """How many requests the server accepts, how much memory it uses and how long it waits."""

    max_queue: int = 256
    """Sequences of one model that may wait for a slot."""
    drain_seconds: float = 30
    """How long running requests may continue after SIGTERM."""
    idle_seconds: float = 120
    """How long a connection without a request stays open. Proxies keep theirs for 60 to 75 seconds by default, and one
    that reuses a connection which closes at that moment reports an error."""
    stall_seconds: float = 60
    """How long a client may stop reading before it is disconnected."""
    memory: int | None = None
    """Bytes of RAM for all models together; None means all but a margin."""
    keep_seconds: float = math.inf
    """How long an idle model stays loaded, unless its card has a ``ttl``."""
    evict_seconds: float = 120
    """How long a model's requests may delay its eviction before they are interrupted and replayed later."""
    residence_seconds: float = 10
    """The minimum time a model stays loaded when several take turns in the same memory."""
    load_seconds: float = 300
    """How long a load may make no progress before it fails."""

    @classmethod
    def load(
        cls,
        *,
        max_queue: int | str | None = None,
        drain: float | str | None = None,
        idle: float | str | None = None,
        stall: float | str | None = None,
        memory: int | str | None = None,
        ttl: float | str | None = None,
    ) -> "Limits":
        """From the flags of ``exo serve`` and their environment variables. Times are in seconds. Raises SettingsError.

        EXO_EVICT_TIMEOUT, EXO_MIN_RESIDENCE and EXO_LOAD_TIMEOUT have no flag.
        """
        unset = cls()
        return cls(
            max_queue=_parse("--max-queue", max_queue, "EXO_MAX_QUEUE", _count, unset.max_queue),
            drain_seconds=_parse("--drain-timeout", drain, "EXO_DRAIN_TIMEOUT", _seconds, unset.drain_seconds),
            idle_seconds=_parse("--idle-timeout", idle, "EXO_IDLE_TIMEOUT", _seconds, unset.idle_seconds),
            stall_seconds=_parse("--stall-timeout", stall, "EXO_STALL_TIMEOUT", _seconds, unset.stall_seconds),
            memory=_parse("--memory-limit", memory, "EXO_MEMORY_LIMIT", _bytes, None),
            keep_seconds=_parse("--ttl", ttl, "EXO_TTL", _seconds, unset.keep_seconds),
            evict_seconds=_parse("", None, "EXO_EVICT_TIMEOUT", _seconds, unset.evict_seconds),
            residence_seconds=_parse("", None, "EXO_MIN_RESIDENCE", _seconds, unset.residence_seconds),
            load_seconds=_parse("", None, "EXO_LOAD_TIMEOUT", _seconds, unset.load_seconds),
        )


@dataclass(frozen=True, slots=True)
class HubAccess:
    """Access to the model hub."""

    endpoint: str | None = None
    """The hub's address; None takes huggingface_hub's default."""
    token: str | None = field(default=None, repr=False)
    """None takes the token that `hf auth login` stored, if any."""
    offline: str | None = None
    """The environment variable that forbids pulling, if one is set."""

    @classmethod
    def load(cls) -> "HubAccess":
        """From HF_ENDPOINT, HF_TOKEN, EXO_OFFLINE and HF_HUB_OFFLINE. Raises SettingsError."""
        endpoint, token = _variable("HF_ENDPOINT"), _variable("HF_TOKEN")
        if endpoint is not None and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", endpoint.value):
            raise endpoint.error("expected an address: https://hub.example")
        if token is not None and not re.fullmatch(r"\s*[!-~]{1,4096}\s*", token.value):
            raise SettingsError("HF_TOKEN: expected printable ASCII characters without spaces")
        offline = (name for name in ("EXO_OFFLINE", "HF_HUB_OFFLINE") if _flag(name))
        return cls(endpoint and endpoint.value.rstrip("/"), token and token.value.strip(), next(offline, None))


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of the command line and the environment. Directories are absolute and need not exist."""

    host: str
    port: int
    """0 takes any free port."""
    models_directory: Path
    """The default directory for pulled models."""
    models_directories: tuple[Path, ...]
    """Search order: read-only directories, ``models_directory``, the others."""
    cards_directory: Path
    log_directory: Path
    access: Access = Access()
    limits: Limits = Limits()
    read_only_directories: tuple[Path, ...] = ()
    """The members of ``models_directories`` that are never written to."""
    hub: HubAccess = HubAccess()
    auto_pull: bool = False
    """Whether the server pulls models that are requested but not on disk."""
    history_file: Path | None = None
    """The input history of `exo chat`; None keeps none."""
    prefer: Prefer | None = None
    """How to choose between runners that have loaded the same model, unless its card decides; None: by its order."""
    speeds_file: Path | None = None
    """Measured speeds of the runners; None keeps none."""
    strict: bool = False
    """Whether the server refuses unknown request fields instead of warning about them."""

    @property
    def is_local(self) -> bool:
        """Whether the server is reachable from this machine only."""
        return is_loopback(self.host)

    def url(self, port: int | None = None) -> str:
        """The server's address, with ``port`` instead of the configured one if given."""
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
        """From the flags of the command line and the environment. Raises SettingsError.

        An empty environment variable counts as unset.
        """
        data = _base_directory("XDG_DATA_HOME", ".local/share")
        state = _base_directory("XDG_STATE_HOME", ".local/state")
        models = _parse("--models-dir", models_directory, "EXO_DEFAULT_MODELS_DIR", _directory, data / "models")
        others = _directories("EXO_MODELS_DIRS")
        read_only = _directories("EXO_MODELS_READ_ONLY_DIRS")
        unset: tuple[str, int | None] = DEFAULT_HOST, None
        name, own_port = _parse("--host", host, "EXO_HOST", _address, unset)
        return cls(
            host=name,
            port=_parse("--port", port, "EXO_PORT", _port, DEFAULT_PORT if own_port is None else own_port),
            models_directory=models,
            models_directories=tuple(dict.fromkeys((*read_only, models, *others))),
            cards_directory=data / "custom_model_cards",
            log_directory=cache_directory() / "exo_log" / "runner_log",
            access=access or Access.load(),
            limits=limits or Limits.load(),
            read_only_directories=read_only,
            hub=HubAccess.load(),
            auto_pull=auto_pull or _flag("EXO_AUTO_PULL"),
            history_file=data / "chat_history",
            prefer=_parse("--prefer", prefer, "EXO_PREFER", _prefer, None),
            speeds_file=state / "speeds.json",
            strict=strict or _flag("EXO_STRICT"),
        )


def variables_without_effect() -> list[str]:
    """The variables that are set for exo and that nothing here reads, such as upstream's for clusters."""
    own = (name for name in os.environ if name.startswith("EXO_") and name not in _OWN_VARIABLES)
    return sorted((*own, *(name for name in _UPSTREAM_VARIABLES if name in os.environ)))


def cache_directory() -> Path:
    """The directory for what can be fetched or built again. Raises SettingsError."""
    return _base_directory("XDG_CACHE_HOME", ".cache")


def is_loopback(host: str) -> bool:
    """Whether a host name or address always refers to this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True, slots=True)
class _Given:
    """A value and the flag or variable that it comes from."""

    source: str
    value: str

    def error(self, expected: str) -> SettingsError:
        return SettingsError(f"{self.source}: {expected} (got {self.value!r})")


def _variable(name: str) -> _Given | None:
    value = os.environ.get(name, "")
    return _Given(name, value) if value else None


def _parse(
    flag: str, value: float | str | Path | None, variable: str, parse: Callable[[_Given], _T], default: _T
) -> _T:
    given = _variable(variable) if value is None else _Given(flag, str(value))
    return default if given is None else parse(given)


def _address(given: _Given) -> tuple[str, int | None]:
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
    return host, _port(_Given(given.source, match[3])) if match[3] else None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _port(given: _Given) -> int:
    if not (given.value.isdecimal() and len(given.value) <= 5 and int(given.value) <= 65535):
        raise given.error("expected a port from 0 to 65535, where 0 is any free one")
    return int(given.value)


def _count(given: _Given) -> int:
    if not (given.value.isdecimal() and len(given.value) <= 6):
        raise given.error("expected a number from 0 to 999999")
    return int(given.value)


def _seconds(given: _Given) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", given.value):
        raise given.error("expected seconds, such as 30 or 0.5")
    return float(given.value)


def _bytes(given: _Given) -> int:
    match = _SIZE.fullmatch(given.value)
    if match is None or not (size := int(float(match[1]) * _UNITS[match[2].upper().removesuffix("B")])):
        raise given.error("expected a size, such as 12GiB, 12GB or a number of bytes")
    return size


def _flag(variable: str) -> bool:
    given = _variable(variable)
    if given is None or given.value.lower() in ("0", "false", "no", "off"):
        return False
    if given.value.lower() not in ("1", "true", "yes", "on"):
        raise given.error("expected true or false")
    return True


def _prefer(given: _Given) -> Prefer:
    for known in get_args(Prefer):
        if given.value == known:
            return known
    raise given.error(f"expected {' or '.join(get_args(Prefer))}")


def _keys(flags: Sequence[str], file: Path | None) -> tuple[ApiKey, ...]:
    """The keys of the flags and the file or, without either, of the environment. Messages never contain a key."""
    texts = [("--api-key", text) for text in flags]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise SettingsError(f"--api-key-file: {file} cannot be read: {error}") from error
        found = [(f"{file}, line {at}", line) for at, line in enumerate(lines, 1) if line and not line.startswith("#")]
        if not found:
            raise SettingsError(f"--api-key-file: {file} holds no key; expected one on each line, as NAME:KEY or KEY")
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
            f"{source}: expected NAME:KEY or KEY, where KEY is {_MIN_KEY_LENGTH} to 512 printable ASCII characters"
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
    """Upstream's rule: EXO_HOME for everything, otherwise the XDG directories, or ``~/.exo`` outside Linux.

    A relative XDG path is invalid according to the XDG Base Directory Specification 0.8.
    """
    if home := _variable("EXO_HOME"):
        return _directory(home, relative_to=None if os.path.isabs(home.value) else _home())
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


def _home() -> Path:
    try:
        return _directory(_Given("HOME", str(Path.home())))
    except RuntimeError as error:
        raise SettingsError("HOME: your home directory is unknown; set HOME or EXO_HOME") from error
