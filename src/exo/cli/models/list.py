"""``exo list``: the models that have a model card or are in other programs' folders, and which files there are."""

from collections.abc import Sequence
from typing import Annotated

import typer
from pydantic import BaseModel
from pydantic_core import to_json
from rich.table import Table

from exo.cards.card import ModelCard
from exo.cards.catalogue import FoundModel
from exo.cli.console import out, warn
from exo.cli.models.local_models import FileState, catalogue_of, kept, store_of
from exo.cli.options import AsJson, ModelsDir
from exo.config import Settings
from exo.store.store import Store


class ListRow(BaseModel):
    """One model card, as ``exo list --json`` prints it."""

    model_id: str
    aliases: list[str]
    family: str
    quantization: str
    size_bytes: int
    runner: str
    backends: list[str]
    on_disk: dict[str, FileState]
    """By runner, for all that may serve the model."""
    found_in: str | None
    """The program that keeps the model, if it has no model card of its own."""


def list_models(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also name files of other programs that cannot be used, and why.")
    ] = False,
    models_dir: ModelsDir = None,
    as_json: AsJson = False,
) -> None:
    """List the models that have a model card or that other programs keep here, those on disk first."""
    settings = Settings.load(models_directory=models_dir)
    store = store_of(settings)
    catalogue = catalogue_of(settings)
    rows = [_row(card, store, catalogue.found.get(card.model_id)) for card in catalogue.cards.values()]
    rows.sort(key=_place)
    if as_json:
        out.print_json(to_json(rows).decode())
    else:
        _print(rows)
    if verbose:
        for line in catalogue.last_found.unusable:
            warn(line)


def _place(row: ListRow) -> int:
    """Model cards on disk, models that other programs keep, and model cards that are not on disk."""
    if row.found_in is not None:
        return 1
    return 0 if any(files.state == "present" for files in row.on_disk.values()) else 2


def _row(card: ModelCard, store: Store, found: FoundModel | None) -> ListRow:
    return ListRow(
        model_id=card.model_id,
        aliases=list(card.aliases),
        family=card.family,
        quantization=card.quantization,
        size_bytes=card.storage_size.in_bytes,
        runner=card.runner,
        backends=list(card.backends),
        on_disk={each.source.runner: FileState.of(each.source, each.found) for each in kept(store, card, card.runners)},
        found_in=found.program if found is not None else None,
    )


def _print(rows: Sequence[ListRow]) -> None:
    table = Table("Model", "Also", "On disk", "Size", "Quantization", "Runners", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(
            row.model_id,
            ", ".join(row.aliases),
            _places(row) or "-",
            f"{row.size_bytes / 1e9:.2f} GB",
            row.quantization,
            ", ".join(row.on_disk),
        )
    out.print(table, markup=False, highlight=False)


def _places(row: ListRow) -> str:
    there = ", ".join(filter(None, (_on_disk(runner, files) for runner, files in row.on_disk.items())))
    return f"{there}, in {row.found_in}" if row.found_in else there


def _on_disk(runner: str, files: FileState) -> str:
    match files.state:
        case "present":
            return f"{runner} {files.bytes / 1e9:.2f} GB"
        case "partial":
            return f"{runner} {100 * files.bytes // files.total}%" if files.total else f"{runner} in part"
        case _:
            return ""
