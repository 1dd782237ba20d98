"""Settings: a flag overrides the environment, which overrides the default.

No other module but ``config_values`` reads the environment.
"""

import ipaddress
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from exo.config_values import (
    DEFAULT_HOST,
    GivenValue,
    SettingsError,
    as_address,
    as_count,
    as_directory,
    as_file,
    as_port,
    as_seconds,
    as_size,
    base_directory,
    directories_in,
    directory_from,
    from_environment,
    home_directory,
    is_set,
    matching,
    value_of,
)
from exo.worker.protocol.remote_host import HostsError, RemoteHost, read_hosts
from exo.worker.protocol.runners import Prefer

DEFAULT_PORT = 52415
_OWN_VARIABLES = (
    *("EXO_API_KEY", "EXO_AUTO_PULL", "EXO_CUDA_PLUGIN", "EXO_DEFAULT_MODELS_DIR", "EXO_DRAIN_TIMEOUT"),
    *("EXO_EVICT_TIMEOUT", "EXO_FIND_MODELS", "EXO_FIND_MODELS_IN", "EXO_HOME", "EXO_HOST", "EXO_IDLE_TIMEOUT"),
    *("EXO_FORCE_LOAD", "EXO_LOAD_TIMEOUT", "EXO_LOG_JSON", "EXO_LOG_PROMPTS", "EXO_MAX_QUEUE"),
    *("EXO_MEMORY_LIMIT", "EXO_MIN_RESIDENCE", "EXO_MODELS_DIRS", "EXO_MODELS_READ_ONLY_DIRS"),
    *("EXO_NO_UPSTREAM_API", "EXO_OFFLINE"),
    *("EXO_PORT", "EXO_PREFER", "EXO_STALL_TIMEOUT", "EXO_STRICT", "EXO_TTL", "EXO_URL", "EXO_LAUNCH_KEY"),
    *("EXO_TEST_RPC_SERVERS", "EXO_VULKAN_PLUGIN"),
)
"""The variables that exo or its documentation uses."""
_UPSTREAM_VARIABLES = ("ENABLE_DISAGGREGATION", "OVERRIDE_MEMORY_MB")
"""Upstream's variables without "EXO_"."""
_MIN_KEY_LENGTH = 8
_KEY = re.compile(rf"(?:([A-Za-z0-9_.-]{{1,64}}):)?([!-9;-~]{{{_MIN_KEY_LENGTH},512}})")
_HOST_PATTERN = re.compile(r"\*|[A-Za-z0-9_.-]{1,253}|[0-9a-fA-F:.]{2,45}")
_IMAGE_HOST = re.compile(r"[a-z0-9_.-]{1,253}(:[0-9]{1,5})?")
_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")
_ORIGIN_PATTERN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s,]{1,255}")


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
        tls = None
        if certificate is not None:
            own_key = certificate_key and as_file("--ssl-keyfile", certificate_key)
            tls = Tls(as_file("--ssl-certfile", certificate), own_key)
        return cls(
            keys=_keys(keys, key_file),
            allowed_hosts=matching("--allowed-host", allowed_hosts, _HOST_PATTERN, "a host name without a port"),
            cors_origins=matching("--cors-origin", cors_origins, _ORIGIN_PATTERN, "an origin: https://example.org"),
            insecure=insecure,
            tls=tls,
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
    force_load: bool = False
    """Whether models are loaded that do not fit by their estimate."""

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
        force_load: bool = False,
    ) -> "Limits":
        """From the flags of ``exo serve`` and their environment variables. Times are in seconds. Raises SettingsError.

        EXO_EVICT_TIMEOUT, EXO_MIN_RESIDENCE and EXO_LOAD_TIMEOUT have no flag.
        """
        unset = cls()
        return cls(
            max_queue=value_of("--max-queue", max_queue, "EXO_MAX_QUEUE", as_count, unset.max_queue),
            drain_seconds=value_of("--drain-timeout", drain, "EXO_DRAIN_TIMEOUT", as_seconds, unset.drain_seconds),
            idle_seconds=value_of("--idle-timeout", idle, "EXO_IDLE_TIMEOUT", as_seconds, unset.idle_seconds),
            stall_seconds=value_of("--stall-timeout", stall, "EXO_STALL_TIMEOUT", as_seconds, unset.stall_seconds),
            memory=value_of("--memory-limit", memory, "EXO_MEMORY_LIMIT", as_size, None),
            keep_seconds=value_of("--ttl", ttl, "EXO_TTL", as_seconds, unset.keep_seconds),
            evict_seconds=value_of("", None, "EXO_EVICT_TIMEOUT", as_seconds, unset.evict_seconds),
            residence_seconds=value_of("", None, "EXO_MIN_RESIDENCE", as_seconds, unset.residence_seconds),
            load_seconds=value_of("", None, "EXO_LOAD_TIMEOUT", as_seconds, unset.load_seconds),
            force_load=force_load or is_set("EXO_FORCE_LOAD"),
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
        endpoint, token = from_environment("HF_ENDPOINT"), from_environment("HF_TOKEN")
        if endpoint is not None and not _URL.fullmatch(endpoint.value):
            raise endpoint.error("expected an address: https://hub.example")
        if token is not None and not re.fullmatch(r"\s*[!-~]{1,4096}\s*", token.value):
            raise SettingsError("HF_TOKEN: expected printable ASCII characters without spaces")
        offline = (name for name in ("EXO_OFFLINE", "HF_HUB_OFFLINE") if is_set(name))
        return cls(endpoint and endpoint.value.rstrip("/"), token and token.value.strip(), next(offline, None))


@dataclass(frozen=True, slots=True)
class OtherFolders:
    """Where other programs keep models, which exo reads and never changes. The folders need not exist."""

    huggingface: tuple[Path, ...] = ()
    ollama: tuple[Path, ...] = ()
    lmstudio: tuple[Path, ...] = ()
    llamacpp: tuple[Path, ...] = ()
    further: tuple[Path, ...] = ()
    """The user's own, from EXO_FIND_MODELS_IN."""

    @classmethod
    def load(cls) -> "OtherFolders":
        """From EXO_FIND_MODELS, EXO_FIND_MODELS_IN and the variables of the programs. Raises SettingsError."""
        further = directories_in("EXO_FIND_MODELS_IN")
        try:
            home = home_directory()
        except SettingsError:  # a service may have none, and need none
            home = None
        if (from_environment("EXO_FIND_MODELS") and not is_set("EXO_FIND_MODELS")) or home is None:
            return cls(further=further)
        cache = directory_from("XDG_CACHE_HOME") or home / ".cache"
        hub = (directory_from("HF_HOME") or cache / "huggingface") / "hub"
        ollama = (directory_from("OLLAMA_MODELS"), home / ".ollama/models", Path("/usr/share/ollama/.ollama/models"))
        return cls(
            huggingface=(directory_from("HF_HUB_CACHE") or hub,),
            ollama=tuple(dict.fromkeys(folder for folder in ollama if folder is not None)),
            lmstudio=(home / ".lmstudio/models", home / ".cache/lm-studio/models"),
            llamacpp=(directory_from("LLAMA_CACHE") or cache / "llama.cpp",),
            further=further,
        )


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
    prefix_directory: Path | None = None
    """Computed prefixes of prompts; None keeps none. Prompts are secret, so each user has a directory."""
    image_hosts: tuple[str, ...] = ()
    """The hosts from which the server fetches pictures in requests."""
    strict: bool = False
    """Whether the server refuses unknown request fields instead of warning about them."""
    log_json: bool = False
    """Whether each line of the server's log is a JSON object."""
    log_prompts: bool = False
    """Whether the access log has the text of prompts."""
    upstream_api: bool = True
    """Whether the server has upstream's routes for instances, the state of a cluster and benchmarks."""
    otlp_endpoint: str | None = None
    """The address of a collector of traces; None exports none."""
    service_name: str = "exo"
    """The server's name in traces."""
    other_folders: OtherFolders = OtherFolders()
    hosts: tuple[RemoteHost, ...] = ()
    """Other machines that run models for the server."""

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
        image_hosts: Sequence[str] = (),
        strict: bool = False,
        log_json: bool = False,
        log_prompts: bool = False,
        no_upstream_api: bool = False,
        otlp_endpoint: str | None = None,
    ) -> "Settings":
        """From the flags of the command line and the environment. Raises SettingsError.

        An empty environment variable counts as unset.
        """
        data = base_directory("XDG_DATA_HOME", ".local/share")
        state = base_directory("XDG_STATE_HOME", ".local/state")
        models = value_of("--models-dir", models_directory, "EXO_DEFAULT_MODELS_DIR", as_directory, data / "models")
        others = directories_in("EXO_MODELS_DIRS")
        read_only = directories_in("EXO_MODELS_READ_ONLY_DIRS")
        unset: tuple[str, int | None] = DEFAULT_HOST, None
        name, own_port = value_of("--host", host, "EXO_HOST", as_address, unset)
        return cls(
            host=name,
            port=value_of("--port", port, "EXO_PORT", as_port, DEFAULT_PORT if own_port is None else own_port),
            models_directory=models,
            models_directories=tuple(dict.fromkeys((*read_only, models, *others))),
            cards_directory=data / "custom_model_cards",
            log_directory=cache_directory() / "exo_log" / "runner_log",
            access=access or Access.load(),
            limits=limits or Limits.load(),
            read_only_directories=read_only,
            hub=HubAccess.load(),
            auto_pull=auto_pull or is_set("EXO_AUTO_PULL"),
            history_file=data / "chat_history",
            prefer=value_of("--prefer", prefer, "EXO_PREFER", _prefer, None),
            speeds_file=state / "speeds.json",
            prefix_directory=cache_directory() / f"prefix_cache-{os.geteuid()}",
            image_hosts=matching("--allow-image-urls", image_hosts, _IMAGE_HOST, "a host name, such as example.org"),
            strict=strict or is_set("EXO_STRICT"),
            log_json=log_json or is_set("EXO_LOG_JSON"),
            log_prompts=log_prompts or is_set("EXO_LOG_PROMPTS"),
            upstream_api=not (no_upstream_api or is_set("EXO_NO_UPSTREAM_API")),
            otlp_endpoint=value_of("--otlp-endpoint", otlp_endpoint, "OTEL_EXPORTER_OTLP_ENDPOINT", _url, None),
            service_name=value_of("", None, "OTEL_SERVICE_NAME", lambda given: given.value, "exo"),
            other_folders=OtherFolders.load(),
            hosts=_remote_hosts(data / "hosts.toml"),
        )


def _remote_hosts(file: Path) -> tuple[RemoteHost, ...]:
    try:
        return read_hosts(file)
    except HostsError as error:
        raise SettingsError(str(error)) from error


def variables_without_effect() -> list[str]:
    """The variables that are set for exo and that nothing here reads, such as upstream's for clusters."""
    own = (name for name in os.environ if name.startswith("EXO_") and name not in _OWN_VARIABLES)
    return sorted((*own, *(name for name in _UPSTREAM_VARIABLES if name in os.environ)))


def cache_directory() -> Path:
    """The directory for what can be fetched or built again. Raises SettingsError."""
    return base_directory("XDG_CACHE_HOME", ".cache")


def is_loopback(host: str) -> bool:
    """Whether a host name or address always refers to this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


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
    if not texts and (variable := from_environment("EXO_API_KEY")):
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


def _url(given: GivenValue) -> str:
    if not _URL.fullmatch(given.value):
        raise given.error("expected an address, such as http://localhost:4318")
    return given.value.rstrip("/")


def _prefer(given: GivenValue) -> Prefer:
    for known in get_args(Prefer):
        if given.value == known:
            return known
    raise given.error(f"expected {' or '.join(get_args(Prefer))}")
