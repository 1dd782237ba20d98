"""``exo list``: the models that have a card, and what of them is on disk."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue
from exo.config import Settings
from exo.store.errors import PullError
from exo.store.file_selection import Source
from exo.store.store import OnDisk, Store
from exo.worker.protocol.runners import RUNNERS


class OnDiskRow(BaseModel):
    """What there is for one runner. Sizes are bytes."""

    state: str
    bytes: int
    total: int | None
    path: str | None
    revision: str | None
    read_only: bool


class ListRow(BaseModel):
    """One model card, as ``exo list --json`` has it."""

    model_id: str
    aliases: list[str]
    family: str
    quantization: str
    size_bytes: int
    """As the card says."""
    runner: str
    backends: list[str]
    on_disk: dict[str, OnDiskRow]
    """By runner; of all that may serve the model."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is on disk of a model for a runner."""

    source: Source
    found: OnDisk


def store_of(settings: Settings) -> Store:
    """The models directories."""
    return Store(settings.models_directories, settings.read_only_directories)


def runners_of(card: ModelCard) -> list[str]:
    """The runners that may serve a model, in the card's order."""
    if card.runner != "auto":
        return [card.runner]
    served = {backend: name for name, spec in RUNNERS.items() for backend in spec.backends}
    return list(dict.fromkeys(served[backend] for backend in card.backends if backend in served))


def kept(store: Store, card: ModelCard, runners: Iterable[str], quant: str | None = None) -> Iterator[Kept]:
    """Of each runner whose table can be read, what is there."""
    for runner in runners:
        try:
            source = Source.of(card, runner, quant)
        except PullError:
            continue  # the runner itself says what is wrong
        yield Kept(source, store.on_disk(source))


def rows(catalogue: Catalogue, store: Store) -> list[ListRow]:
    """Every model, in alphabetical order."""
    return [_row(card, store) for card in catalogue.cards.values()]


def show(listed: Sequence[ListRow], out: Console) -> None:
    """A table."""
    table = Table("Model", "Also", "On disk", "Size", "Quantization", "Runners", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for row in listed:
        table.add_row(
            row.model_id,
            ", ".join(row.aliases),
            ", ".join(filter(None, (_here(runner, found) for runner, found in row.on_disk.items()))) or "-",
            f"{row.size_bytes / 1e9:.2f} GB",
            row.quantization,
            ", ".join(row.on_disk),
        )
    out.print(table, markup=False, highlight=False)


def _row(card: ModelCard, store: Store) -> ListRow:
    return ListRow(
        model_id=card.model_id,
        aliases=list(card.aliases),
        family=card.family,
        quantization=card.quantization,
        size_bytes=card.storage_size.in_bytes,
        runner=card.runner,
        backends=list(card.backends),
        on_disk={each.source.runner: _on_disk(each.found) for each in kept(store, card, runners_of(card))},
    )


def _on_disk(found: OnDisk) -> OnDiskRow:
    return OnDiskRow(
        state=found.state,
        bytes=found.bytes,
        total=found.total,
        path=str(found.path) if found.path is not None else None,
        revision=found.revision,
        read_only=found.read_only,
    )


def _here(runner: str, found: OnDiskRow) -> str:
    match found.state:
        case "present":
            return f"{runner} {found.bytes / 1e9:.2f} GB"
        case "partial":
            return f"{runner} {100 * found.bytes // found.total}%" if found.total else f"{runner} in part"
        case _:
            return ""
