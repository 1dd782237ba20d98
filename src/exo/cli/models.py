"""The commands about models: pull, list, show, add, rm."""

from typing import Annotated

import typer

from exo.cli.common import (
    ApiKeyFile,
    ApiKeys,
    AsJson,
    Card,
    Host,
    Model,
    ModelsDir,
    Port,
    Quant,
    Runner,
    ServerCertificate,
    access_from,
    card_from,
    catalogue_from,
    check_runner,
    err,
    fail,
    out,
    say,
    settings_from,
    told_failures,
    warn,
)
from exo.exit_code import ExitCode


def pull(model: Model, runner: Runner = None, quant: Quant = None, models_dir: ModelsDir = None) -> None:
    """Fetch a model's files, verified; what an interrupted pull has left is not fetched again."""
    from exo.cli.pull import is_what_the_card_loads, pull_model
    from exo.worker.router import parse_model

    wish = parse_model(model)
    check_runner(runner)
    if None not in (runner, wish.runner) and runner != wish.runner:
        fail(f"--runner: {model} asks for runner {wish.runner} (got {runner!r})", ExitCode.USAGE)
    settings = settings_from(models_dir=models_dir)
    card = card_from(catalogue_from(settings), wish.name)
    with told_failures():
        planned, found = pull_model(settings, card, runner or wish.runner, quant, err)
    label = f"{planned.quant}, " if planned.quant else ""
    where = f"{found.path} ({label}{planned.total / 1e9:.2f} GB, revision {planned.revision[:12]})"
    say(f"{card.model_id} for {planned.source.runner}: {where}")
    if not is_what_the_card_loads(card, planned):
        warn(f"the card names another file; file = {planned.files[0].name!r} in its table [cuda] has this one loaded")


def list_models(models_dir: ModelsDir = None, as_json: AsJson = False) -> None:
    """List the models that have a card, and what of them is on disk."""
    from pydantic_core import to_json

    from exo.cli.list import rows, show, store_of

    settings = settings_from(models_dir=models_dir)
    listed = rows(catalogue_from(settings), store_of(settings))
    if as_json:
        out.print_json(to_json(listed).decode())
    else:
        show(listed, out)


def show(model: Card, models_dir: ModelsDir = None, as_json: AsJson = False) -> None:
    """Print a model's card, what is on disk, and which engines could serve it here and why the others not."""
    import anyio

    from exo.cli.list import store_of
    from exo.cli.show import render, show_model
    from exo.worker.supervisor.host_probe import probe_host

    settings = settings_from(models_dir=models_dir)
    catalogue = catalogue_from(settings)
    shown = show_model(card_from(catalogue, model), catalogue, store_of(settings), anyio.run(probe_host))
    if as_json:
        out.print_json(shown.model_dump_json())
    else:
        render(shown, out)


def add(
    reference: Annotated[str, typer.Argument(metavar="REPO[:QUANT]", help="A repository on the hub: OWNER/NAME.")],
    name: Annotated[
        str | None, typer.Option(help="The card's model id, where it is not to be the repository's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a card of that model id.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model card from what a repository says of itself, without fetching the weights."""
    from exo.cli.pull import pull_failure
    from exo.store.discover.add import AddError, as_text
    from exo.store.discover.add import add as add_card
    from exo.store.errors import PullError
    from exo.store.hub import Hub

    settings = settings_from()
    catalogue, directory = catalogue_from(settings), settings.cards_directory
    with told_failures(), err.status(f"asking the hub about {reference.partition(':')[0]}"):
        try:
            added = add_card(reference, Hub(settings.hub), catalogue, directory, name=name, overwrite=overwrite)
        except AddError as error:
            fail(str(error))
        except PullError as error:
            raise pull_failure(error) from error
    if as_json:
        out.print_json(added.model_dump_json())
        return
    for line in as_text(added):
        say(line)


def remove(
    model: Card,
    runner: Runner = None,
    quant: Quant = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    models_dir: ModelsDir = None,
    host: Host = None,
    port: Port = None,
    api_key: ApiKeys = None,
    api_key_file: ApiKeyFile = None,
    ssl_certfile: ServerCertificate = None,
) -> None:
    """Delete the files that were pulled for a model. Its card stays; files put there by hand do too."""
    from exo.cli.rm import begin_removal

    check_runner(runner)
    access = access_from(api_key, api_key_file, ssl_certfile=ssl_certfile)
    settings = settings_from(host, port, models_dir, access)
    card = card_from(catalogue_from(settings), model)
    with told_failures():
        removal = begin_removal(settings, card, runner, quant)
        for note in removal.notes:
            warn(note)
        for line in removal.lines():
            say(line)
        if not yes and not typer.confirm("delete this?", err=True):
            fail("nothing is deleted")
        files, size = removal.carry_out()
    say(f"deleted {files} files, {size:,} bytes")
