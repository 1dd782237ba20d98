"""What the commands share: their options, settings from them, and how they end."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from exo.exit_code import CommandError, ExitCode

if TYPE_CHECKING:
    from exo.cards.card import ModelCard
    from exo.cards.catalogue import Catalogue
    from exo.config import Access, Limits, Settings

out = Console()
err = Console(stderr=True)


def complete_model(incomplete: str) -> list[str]:
    """Model ids and aliases that begin so, for the shell; a card that is broken is nothing to speak of here."""
    from exo.cards.catalogue import Catalogue
    from exo.config import Settings, SettingsError

    try:
        catalogue = Catalogue.load(Settings.load().cards_directory)
    except SettingsError:
        return []
    return sorted(name for name in {*catalogue.cards, *catalogue.aliases} if name.startswith(incomplete))


Model = Annotated[
    str,
    typer.Argument(
        help="Model id or alias, perhaps with @runner, such as gemma-3-270m@cuda.", autocompletion=complete_model
    ),
]
Card = Annotated[str, typer.Argument(help="Model id or alias.", autocompletion=complete_model, metavar="MODEL")]
Host = Annotated[str | None, typer.Option(help="Address to listen on, or where the server is. Default 127.0.0.1.")]
Port = Annotated[str | None, typer.Option(help="Port of the server; 0 is any free one. Default 52415.")]
ModelsDir = Annotated[Path | None, typer.Option("--models-dir", help="Where models are kept.")]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key", help="NAME:KEY or KEY; may be given again. Other users see it in the process list. EXO_API_KEY."
    ),
]
ApiKeyFile = Annotated[Path | None, typer.Option("--api-key-file", help="A file of keys, one a line.")]
ServerCertificate = Annotated[
    Path | None, typer.Option("--ssl-certfile", help="The server speaks HTTPS with this certificate.")
]
Runner = Annotated[str | None, typer.Option(help="Whose files: cuda or mlx.")]
Quant = Annotated[str | None, typer.Option(help="A quantisation other than the card's, such as Q4_K_M; for cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def say(text: str) -> None:
    """A line on standard output, as it is."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """A line on standard error."""
    err.print(f"exo: {text}", markup=False, highlight=False, soft_wrap=True)


def fail(message: str, code: ExitCode = ExitCode.FAILED) -> NoReturn:
    """Ends the command with an error on standard error."""
    warn(message)
    if code is ExitCode.INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a thread that waits for a silent hub would hold the program up until its socket gives in
    raise typer.Exit(code)


@contextmanager
def told_failures() -> Generator[None]:
    """Ends the command where what is done inside cannot be done."""
    try:
        yield
    except CommandError as error:
        fail(str(error), error.code)


def settings_from(
    host: str | None = None,
    port: str | None = None,
    models_dir: Path | None = None,
    access: "Access | None" = None,
    limits: "Limits | None" = None,
    *,
    auto_pull: bool = False,
    prefer: str | None = None,
    strict: bool = False,
) -> "Settings":
    """Settings from flags and environment, or the error that names the one at fault."""
    from exo.config import Settings, SettingsError

    try:
        return Settings.load(
            host=host,
            port=port,
            models_directory=models_dir,
            access=access,
            limits=limits,
            auto_pull=auto_pull,
            prefer=prefer,
            strict=strict,
        )
    except SettingsError as error:
        fail(str(error), ExitCode.USAGE)


def access_from(
    api_key: list[str] | None,
    api_key_file: Path | None,
    allowed_host: list[str] | None = None,
    cors_origin: list[str] | None = None,
    insecure: bool = False,
    ssl_certfile: Path | None = None,
    ssl_keyfile: Path | None = None,
) -> "Access":
    """Who may use the server, from flags and environment, or the error that names the one at fault."""
    from exo.config import Access, SettingsError

    try:
        return Access.load(
            keys=api_key or (),
            key_file=api_key_file,
            allowed_hosts=allowed_host or (),
            cors_origins=cors_origin or (),
            insecure=insecure,
            certificate=ssl_certfile,
            certificate_key=ssl_keyfile,
        )
    except SettingsError as error:
        fail(str(error), ExitCode.USAGE)


def limits_from(
    max_queue: str | None,
    drain_timeout: str | None,
    stall_timeout: str | None,
    memory_limit: str | None,
    ttl: str | None,
) -> "Limits":
    """How much the server takes on, from flags and environment, or the error that names the one at fault."""
    from exo.config import Limits, SettingsError

    try:
        return Limits.load(max_queue=max_queue, drain=drain_timeout, stall=stall_timeout, memory=memory_limit, ttl=ttl)
    except SettingsError as error:
        fail(str(error), ExitCode.USAGE)


def check_runner(runner: str | None) -> None:
    """Fails where ``--runner`` names none."""
    from exo.worker.protocol.runners import RUNNERS

    if runner is not None and runner not in RUNNERS:
        fail(f"--runner: there is no runner {runner!r}; there are {', '.join(RUNNERS)}", ExitCode.USAGE)


def catalogue_from(settings: "Settings") -> "Catalogue":
    """The catalogue; what is wrong with single cards goes to standard error and stops nothing."""
    from exo.cards.catalogue import Catalogue

    catalogue = Catalogue.load(settings.cards_directory)
    for problem in catalogue.problems:
        warn(f"model card {problem}")
    return catalogue


def card_from(catalogue: "Catalogue", name: str) -> "ModelCard":
    """The card of a model id or alias, or the error that suggests others."""
    from exo.worker.router import model_not_found

    card = catalogue.get(name)
    if card is None:
        fail(model_not_found(name, catalogue.suggest(name)).message, ExitCode.NOT_FOUND)
    return card
