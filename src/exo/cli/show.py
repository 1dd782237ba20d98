"""``exo show``: one model's card, what is on disk of it, and which engines could serve it here."""

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue
from exo.store.errors import PullError
from exo.store.file_selection import Source
from exo.store.store import Store
from exo.worker.host import Host
from exo.worker.protocol.runners import RUNNERS
from exo.worker.router import Refusal, Route, route


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class Files(_Shown):
    """Where a model's files are from, and what of them is here."""

    source: str | None
    """The repository, and of it the GGUF file or pattern, or the path."""
    state: Literal["present", "partial", "absent"] | None
    """None where the card's table for the runner is broken, which the engine's ``reason`` then tells."""
    bytes: int = 0
    """On disk."""
    total: int | None = None
    """Bytes when whole, where that is known."""
    path: str | None = None
    """What the runner loads, or where a part of it is."""
    revision: str | None = None
    read_only: bool = False


class Engine(Files):
    """One runner that the card is for, and the model's files for it."""

    runner: str
    backend: str | None
    """What it would compute on; None where it cannot serve the model here."""
    reason: str
    """The router's, for or against."""
    draft: Files | None = None
    """The draft model's, where the card has one."""


class ShownModel(_Shown):
    """A model as far as it is known without the network."""

    card: ModelCard
    file: str | None
    """The card's."""
    problems: tuple[str, ...]
    """What is wrong with that file now."""
    engines: tuple[Engine, ...]
    route: str | None
    """The runner that would be chosen of itself; None where there is none."""
    reason: str
    """The router's, for that choice or against every one."""


def show_model(card: ModelCard, catalogue: Catalogue, store: Store, host: Host) -> ShownModel:
    """Looks at the disk, and nowhere else."""
    file = catalogue.files.get(card.model_id)
    decision = _decide(None, card, host)
    runners = [name for name, spec in RUNNERS.items() if set(spec.backends) & set(card.backends)]
    return ShownModel(
        card=card,
        file=str(file) if file is not None else None,
        problems=tuple(str(problem) for problem in catalogue.problems if problem.file == str(file)),
        engines=tuple(_engine(runner, card, store, host) for runner in runners),
        route=decision.runner if isinstance(decision, Route) else None,
        reason=decision.reason if isinstance(decision, Route) else decision.message,
    )


def _decide(runner: str | None, card: ModelCard, host: Host) -> Route | Refusal:
    """For what the model is for: text, or else vectors or scores."""
    return route(runner, card, host, (), card.needs)


def _engine(runner: str, card: ModelCard, store: Store, host: Host) -> Engine:
    decision = _decide(runner, card, host)
    backend, reason = (decision.backend, decision.reason) if isinstance(decision, Route) else (None, decision.message)
    try:
        source, draft = Source.of(card, runner), Source.of_draft(card, runner)
    except PullError as error:
        return Engine(runner=runner, backend=None, reason=str(error), source=None, state=None)
    of_draft = _files(draft, store) if draft is not None else None
    return Engine(runner=runner, backend=backend, reason=reason, draft=of_draft, **dict(_files(source, store)))


def _files(source: Source, store: Store) -> Files:
    disk = store.on_disk(source)
    return Files(
        source=": ".join(part for part in (source.repo, source.path or source.file) if part) or None,
        state=disk.state,
        bytes=disk.bytes,
        total=disk.total,
        path=str(disk.path) if disk.path is not None else None,
        revision=disk.revision,
        read_only=disk.read_only,
    )


def render(shown: ShownModel, out: Console) -> None:
    """For people."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(shown):
        table.add_row(name, escape(value))
    out.print(table, highlight=False)


def _rows(shown: ShownModel) -> Iterator[tuple[str, str]]:
    card = shown.card
    yield "model", card.model_id
    if card.aliases:
        yield "also", ", ".join(card.aliases)
    if shown.file is not None:
        yield "card", shown.file
    for problem in shown.problems:
        yield "problem", problem
    yield "kind", ", ".join(filter(None, (card.base_model, card.family, card.quantization, *card.tasks)))
    heads = f", {card.num_key_value_heads} key/value heads" if card.num_key_value_heads else ""
    yield "shape", f"{card.n_layers} layers of {card.hidden_size}{heads}"
    yield "context", f"{card.context_length:,} tokens" if card.context_length else "not stated"
    yield "size", f"{_gb(card.storage_size.in_bytes)} by its card"
    if card.capabilities:
        yield "can", ", ".join(card.capabilities)
    defaults = card.sampling_defaults
    for name, values in (("", defaults), (" thinking", defaults.thinking), (" not thinking", defaults.non_thinking)):
        if values is not None and (given := values.model_dump(exclude_none=True, exclude={"thinking", "non_thinking"})):
            yield f"sampling{name}", ", ".join(f"{key} {value}" for key, value in given.items())
    yield "runner", f"{card.runner} -> {shown.route or 'none'}: {shown.reason}"
    for engine in shown.engines:
        yield "", ""
        yield from _engine_rows(engine)


def _engine_rows(engine: Engine) -> Iterator[tuple[str, str]]:
    yield engine.runner, f"{engine.backend or 'cannot serve it here'}: {engine.reason}"
    if engine.source is not None:
        yield "source", engine.source
    if engine.state is not None:
        yield "on disk", _on_disk(engine)
    if engine.draft is not None:
        yield "draft model", engine.draft.source or "none named"
        yield "on disk", _on_disk(engine.draft)


def _on_disk(files: Files) -> str:
    if files.state == "absent":
        return "no"
    whole = "yes" if files.state == "present" else f"in part, {_gb(files.bytes)} of {_gb(files.total)}"
    size = f", {_gb(files.bytes)}" if files.state == "present" else ""
    revision = f", revision {files.revision[:12]}" if files.revision else ""
    return f"{whole}{size}, {files.path}{revision}{', read-only' if files.read_only else ''}"


def _gb(size: int | None) -> str:
    return f"{size / 1e9:.2f} GB" if size is not None else "an unknown size"
