"""``exo serve``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from exo.api.server import ListenError, serve_forever
from exo.cards.catalogue import FoundModel
from exo.cli.console import say
from exo.cli.models.local_models import catalogue_of
from exo.cli.models.named_model import named_model
from exo.cli.options import ModelsDir, ServerOptions
from exo.config import Limits, Settings
from exo.exit_code import CommandError, ExitCode
from exo.worker.protocol.remote_host import HostsError, RemoteHost


@dataclass(frozen=True, slots=True)
class AccessOptions:
    """Who may use the server, besides the keys."""

    insecure: Annotated[
        bool, typer.Option("--insecure", help="Accept other machines without a key, if --host admits them.")
    ] = False
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Another host name that clients may use; * is any. Repeatable.")
    ] = None
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web origin whose pages may use the server; * is any. Repeatable.")
    ] = None
    ssl_keyfile: Annotated[Path | None, typer.Option(help="The certificate's private key.")] = None


@dataclass(frozen=True, slots=True)
class LimitOptions:
    """Numbers of requests, times and memory."""

    max_queue: Annotated[
        str | None, typer.Option(help="Sequences of one model that may wait for a slot. Default: 256.")
    ] = None
    drain_timeout: Annotated[
        str | None, typer.Option(help="Seconds that running requests get when the server is stopped. Default: 30.")
    ] = None
    idle_timeout: Annotated[
        str | None, typer.Option(help="Seconds that a connection without a request stays open. Default 120.")
    ] = None
    stall_timeout: Annotated[
        str | None, typer.Option(help="Seconds until a client that does not read is disconnected. Default: 60.")
    ] = None
    memory_limit: Annotated[
        str | None, typer.Option(help="RAM for all models together, such as 12GB. Default: all but a margin.")
    ] = None
    force_load: Annotated[
        bool, typer.Option("--force-load", help="Load models that do not fit by their estimate. EXO_FORCE_LOAD.")
    ] = False
    ttl: Annotated[
        str | None, typer.Option(help="Seconds that an idle model stays loaded. Default: it stays loaded.")
    ] = None

    def limits(self) -> Limits:
        """Raises SettingsError."""
        return Limits.load(
            max_queue=self.max_queue,
            drain=self.drain_timeout,
            idle=self.idle_timeout,
            stall=self.stall_timeout,
            memory=self.memory_limit,
            ttl=self.ttl,
            force_load=self.force_load,
        )


@dataclass(frozen=True, slots=True)
class LogOptions:
    """What the server says of its requests. The names are those of the settings."""

    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log a JSON object in each line instead of text. EXO_LOG_JSON.")
    ] = False
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log the text of prompts as well. EXO_LOG_PROMPTS.")
    ] = False
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Export traces to this OpenTelemetry collector: http://localhost:4318.")
    ] = None


def serve(
    *,
    server: ServerOptions,
    models_dir: ModelsDir = None,
    load: Annotated[
        list[str] | None,
        typer.Option(
            help="Load this model at the start: a model id or alias, hf.co/OWNER/NAME[:QUANT], or the path of a GGUF"
            " file or model folder. Repeatable."
        ),
    ] = None,
    auto_pull: Annotated[
        bool, typer.Option("--auto-pull", help="Download a requested model that is not on disk. EXO_AUTO_PULL.")
    ] = False,
    allow_image_urls: Annotated[
        list[str] | None,
        typer.Option(help="A host from which pictures may be fetched that a request names by address. Repeatable."),
    ] = None,
    access: AccessOptions,
    limits: LimitOptions,
    prefer: Annotated[
        str | None,
        typer.Option(help="latency or throughput: among runners with the model loaded, prefer the faster one."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Use the nodes of a Ray cluster as hosts: HOST:PORT, or auto for the cluster that runs here."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse unknown request fields instead of warning. EXO_STRICT.")
    ] = False,
    no_upstream_api: Annotated[
        bool,
        typer.Option(
            "--no-upstream-api", help="Leave upstream exo's /state, /instance and /bench. EXO_NO_UPSTREAM_API."
        ),
    ] = False,
    logs: LogOptions,
) -> None:
    """Serve models on one OpenAI-compatible endpoint until interrupted."""
    settings = Settings.load(
        host=server.host,
        port=server.port,
        models_directory=models_dir,
        access=server.access(
            allowed_hosts=access.allowed_host or (),
            cors_origins=access.cors_origin or (),
            insecure=access.insecure,
            certificate_key=access.ssl_keyfile,
        ),
        limits=limits.limits(),
        auto_pull=auto_pull,
        prefer=prefer,
        image_hosts=allow_image_urls or (),
        strict=strict,
        **asdict(logs),
        no_upstream_api=no_upstream_api,
    )
    if ray is not None:
        settings = replace(settings, hosts=_with_ray(settings.hosts, ray))
    named = [named_model(settings, model) for model in load or ()]
    own = _checked([model for each in named for model in each.own])
    try:
        serve_forever(
            settings,
            catalogue_of(settings, own),
            [each.name for each in named],
            lambda url: say(f"exo is listening on {url} (API documentation: {url}/docs)"),
        )
    except ListenError as error:
        raise CommandError(str(error)) from error


def _with_ray(hosts: Sequence[RemoteHost], address: str) -> tuple[RemoteHost, ...]:
    """The hosts, and the nodes of a Ray cluster. A host of the file hides the node with its name."""
    from exo.serving.hosts.ray_cluster import ray_hosts

    try:
        nodes = ray_hosts(address)
    except HostsError as error:
        raise CommandError(str(error)) from error
    known = {each.name for each in hosts}
    return (*hosts, *(each for each in nodes if each.name not in known))


def _checked(models: Sequence[FoundModel]) -> Sequence[FoundModel]:
    """Raises CommandError if two different paths give one model id."""
    paths: dict[str, Path] = {}
    for each in models:
        if (first := paths.setdefault(each.card.model_id, each.path)) != each.path:
            message = f"--load: {first} and {each.path} would both be {each.card.model_id}; rename one of them"
            raise CommandError(message, ExitCode.USAGE)
    return models
