"""``exo add``."""

from typing import Annotated

import typer

from exo.cards.catalogue import Catalogue
from exo.cli.console import err, out, say
from exo.cli.models.local_models import catalogue_of
from exo.cli.models.pull import pull_failure
from exo.cli.options import AsJson
from exo.config import Settings
from exo.exit_code import CommandError
from exo.store.discover.add import Added, AddError, as_text
from exo.store.discover.add import add as add_card
from exo.store.errors import PullError
from exo.store.hub import Hub


def add(
    reference: Annotated[
        str, typer.Argument(metavar="REPO[:QUANT]", help="A repository on the hub: OWNER/NAME, or hf.co/OWNER/NAME.")
    ],
    name: Annotated[str | None, typer.Option(help="The card's model id. Default: the repository's name.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a card with that model id.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model card for a repository on the hub, without downloading the weights."""
    settings = Settings.load()
    added = add_model(settings, catalogue_of(settings), reference, name, overwrite=overwrite)
    if as_json:
        out.print_json(added.model_dump_json())
        return
    for line in as_text(added):
        say(line)


def add_model(
    settings: Settings, catalogue: Catalogue, reference: str, name: str | None, *, overwrite: bool = False
) -> Added:
    """Asks the hub and writes the model card. Raises CommandError."""
    with err.status(f"asking the hub about {reference}"):
        try:
            return add_card(
                reference, Hub(settings.hub), catalogue, settings.cards_directory, name=name, overwrite=overwrite
            )
        except AddError as error:
            raise CommandError(str(error)) from error
        except PullError as error:
            raise pull_failure(error) from error
