"""The commands that are a server, or ask one: serve, ps, stop."""

import json
from pathlib import Path
from typing import Annotated

import typer

from exo.cli.common import (
    ApiKeyFile,
    ApiKeys,
    AsJson,
    Host,
    Model,
    ModelsDir,
    Port,
    ServerCertificate,
    access_from,
    catalogue_from,
    fail,
    limits_from,
    out,
    say,
    settings_from,
    told_failures,
)


def serve(
    host: Host = None,
    port: Port = None,
    models_dir: ModelsDir = None,
    load: Annotated[list[str] | None, typer.Option(help="Load this model at the start; may be given again.")] = None,
    auto_pull: Annotated[
        bool, typer.Option("--auto-pull", help="Pull a model that is asked for and not on disk. EXO_AUTO_PULL.")
    ] = False,
    api_key: ApiKeys = None,
    api_key_file: ApiKeyFile = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines in without a key, where --host does.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A further host name that clients may use; * is any.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web origin whose pages may use the server; * is any.")
    ] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Serve HTTPS with this certificate.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="The certificate's private key.")] = None,
    max_queue: Annotated[
        str | None, typer.Option(help="Sequences of one model that may wait for a slot. Default 256.")
    ] = None,
    drain_timeout: Annotated[
        str | None, typer.Option(help="Seconds that running requests have when the server is stopped. Default 30.")
    ] = None,
    stall_timeout: Annotated[
        str | None, typer.Option(help="Seconds until a client that does not read is cut off. Default 60.")
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Memory that all models together may take, such as 12GB. Default: almost all.")
    ] = None,
    ttl: Annotated[
        str | None, typer.Option(help="Seconds that a model stays loaded without being used. Default: for ever.")
    ] = None,
    prefer: Annotated[
        str | None,
        typer.Option(help="latency or throughput: of runners that have loaded a model, take the one measured faster."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse unknown fields of requests instead of warning. EXO_STRICT.")
    ] = False,
) -> None:
    """Serve models on one OpenAI-compatible endpoint until interrupted."""
    from exo.api.server import ListenError, serve_forever

    access = access_from(api_key, api_key_file, allowed_host, cors_origin, insecure, ssl_certfile, ssl_keyfile)
    limits = limits_from(max_queue, drain_timeout, stall_timeout, memory_limit, ttl)
    settings = settings_from(host, port, models_dir, access, limits, auto_pull=auto_pull, prefer=prefer, strict=strict)
    catalogue = catalogue_from(settings)
    try:
        serve_forever(
            settings,
            catalogue,
            load or (),
            lambda url: say(f"exo is listening on {url} (API documentation: {url}/docs)"),
        )
    except ListenError as error:
        fail(str(error))


def ps(
    host: Host = None,
    port: Port = None,
    api_key: ApiKeys = None,
    api_key_file: ApiKeyFile = None,
    ssl_certfile: ServerCertificate = None,
    as_json: AsJson = False,
) -> None:
    """Show what the running server has loaded, how busy it is, and what died of what."""
    from exo.cli.http_client import server_client
    from exo.cli.ps import ask_server, show

    settings = settings_from(host, port, access=access_from(api_key, api_key_file, ssl_certfile=ssl_certfile))
    with told_failures(), server_client(settings) as client:
        instances = ask_server(client)
    if as_json:
        out.print_json(instances.model_dump_json())
    else:
        show(instances, out)


def stop(
    model: Model,
    host: Host = None,
    port: Port = None,
    api_key: ApiKeys = None,
    api_key_file: ApiKeyFile = None,
    ssl_certfile: ServerCertificate = None,
    as_json: AsJson = False,
) -> None:
    """Have the running server unload a model and give its memory back. The server itself is stopped with Ctrl-C."""
    from exo.cli.http_client import ask, server_client

    settings = settings_from(host, port, access=access_from(api_key, api_key_file, ssl_certfile=ssl_certfile))
    with told_failures(), server_client(settings) as client:
        reply = ask(client, "/v1/models/unload", body={"model": model}, seconds=None)
    if as_json:
        out.print_json(reply.decode())
    else:
        say(f"{model} {'is unloaded' if json.loads(reply)['unloaded'] else 'was not loaded'}")
