"""``exo show``: a model's card, its files, the engines that could serve it here, and the memory that it would take."""

from collections.abc import Iterator, Mapping

import anyio
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue
from exo.cli.console import out
from exo.cli.models.local_models import FileState, card_of, catalogue_of, store_of
from exo.cli.options import AsJson, Card, ModelsDir
from exo.config import Settings
from exo.store.errors import PullError
from exo.store.file_selection import Source
from exo.store.store import Store
from exo.worker.host import Host
from exo.worker.protocol.commands import Load
from exo.worker.protocol.runners import RUNNERS
from exo.worker.router import Refusal, Route, route
from exo.worker.supervisor.dry_run import dry_run
from exo.worker.supervisor.host_probe import probe_host
from exo.worker.supervisor.memory.host import capacity, usable_ram
from exo.worker.supervisor.memory.memory import Memory
from exo.worker.supervisor.placement_plan import PlacementPlan, layers_in_words

_SHOWN = ("n_ctx", "max_model_len", "slots", "kv", "n_gpu_layers", "cpu_moe", "cache_type_k", "cache_type_v")
"""Settings that have a row of their own."""


class EngineRow(FileState):
    """One runner of the model card, and the model's files for it."""

    runner: str
    backend: str | None
    """None if it cannot serve the model here."""
    reason: str
    """The router's reason for or against it."""
    draft: FileState | None = None
    """The files of the draft model, if the card has one."""
    adapters: Mapping[str, FileState] = {}
    """The files of each adapter, by its name."""
    plan: PlacementPlan | None = None
    """None if the files are not on disk or the runner gives no estimate."""


class ShownModel(BaseModel):
    """Everything that is known about a model without the network."""

    model_config = ConfigDict(frozen=True)

    card: ModelCard
    file: str | None
    found_in: str | None
    """The program that keeps the model, if its card has no file."""
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    engines: tuple[EngineRow, ...]
    route: str | None
    """The runner that would be chosen without a wish; None if there is none."""
    reason: str
    """The router's reason for that choice or against every runner."""


def show(model: Card, models_dir: ModelsDir = None, as_json: AsJson = False) -> None:
    """Show a model's card, its files, the engines that could serve it here, and their context and memory."""
    settings = Settings.load(models_directory=models_dir)
    catalogue = catalogue_of(settings)
    card, host = card_of(catalogue, model), anyio.run(probe_host)
    shown = show_model(card, catalogue, store_of(settings), host)
    plans = {each.runner: anyio.run(placement_plan, each, card, host, settings) for each in shown.engines}
    engines = tuple(each.model_copy(update={"plan": plans[each.runner]}) for each in shown.engines)
    shown = shown.model_copy(update={"engines": engines})
    if as_json:
        out.print_json(shown.model_dump_json())
    else:
        render(shown, out)


def show_model(card: ModelCard, catalogue: Catalogue, store: Store, host: Host) -> ShownModel:
    """Reads the disk only. Has no memory plans."""
    file, found = catalogue.files.get(card.model_id), catalogue.found.get(card.model_id)
    decision = route(None, card, host, (), card.needs)
    runners = [name for name, spec in RUNNERS.items() if set(spec.backends) & set(card.backends)]
    return ShownModel(
        card=card,
        file=str(file) if file is not None else None,
        found_in=found.program if found is not None else None,
        notes=found.notes if found is not None else (),
        problems=tuple(str(problem) for problem in catalogue.problems if problem.file == str(file)),
        engines=tuple(_engine(runner, card, store, host) for runner in runners),
        route=decision.runner if isinstance(decision, Route) else None,
        reason=decision.message if isinstance(decision, Refusal) else decision.reason,
    )


def _engine(runner: str, card: ModelCard, store: Store, host: Host) -> EngineRow:
    decision = route(runner, card, host, (), card.needs)
    backend, reason = (decision.backend, decision.reason) if isinstance(decision, Route) else (None, decision.message)
    try:
        source, draft = Source.of(card, runner), Source.of_draft(card, runner)
        adapters = {each.adapter: FileState.of(each, store.on_disk(each)) for each in Source.of_adapters(card, runner)}
    except PullError as error:
        return EngineRow(runner=runner, backend=None, reason=str(error))
    of_draft = FileState.of(draft, store.on_disk(draft)) if draft is not None else None
    files = FileState.of(source, store.on_disk(source))
    found = dict(files)
    return EngineRow(runner=runner, backend=backend, reason=reason, draft=of_draft, adapters=adapters, **found)


async def placement_plan(engine: EngineRow, card: ModelCard, host: Host, settings: Settings) -> PlacementPlan | None:
    """How the server would load the model with no other model loaded; None for one that is not on disk."""
    if engine.backend is None or engine.state != "present":
        return None
    load = Load(
        model_id=card.model_id,
        backend=engine.backend,
        table=card.engines.get(engine.runner, {}),
        directories=tuple(map(str, settings.models_directories)),
        tasks=card.tasks,
    )
    here = capacity(host, settings.limits.memory)
    if settings.limits.memory is None:
        here = Memory(min(here.host, usable_ram(())), here.devices)
    forced = settings.limits.force_load or card.force_load
    return await dry_run(RUNNERS[engine.runner].command, load, engine.runner, here, forced=forced)


def render(shown: ShownModel, console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(shown):
        table.add_row(name, escape(value))
    console.print(table, highlight=False)


def _rows(shown: ShownModel) -> Iterator[tuple[str, str]]:
    card = shown.card
    yield "model", card.model_id
    if card.aliases:
        yield "also", ", ".join(card.aliases)
    if shown.file is not None:
        yield "card", shown.file
    if shown.found_in is not None:
        yield "found in", f"{shown.found_in}; its model card is made from its files"
    for note in shown.notes:
        yield "note", note
    for problem in shown.problems:
        yield "problem", problem
    yield "kind", ", ".join(filter(None, (card.base_model, card.family, card.quantization, *card.tasks)))
    heads = f", {card.num_key_value_heads} key/value heads" if card.num_key_value_heads else ""
    yield "shape", f"{card.n_layers} layers of {card.hidden_size}{heads}"
    yield "trained for", f"{card.context_length:,} tokens" if card.context_length else "a context that is not stated"
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


def _engine_rows(engine: EngineRow) -> Iterator[tuple[str, str]]:
    yield engine.runner, f"{engine.backend or 'cannot serve it here'}: {engine.reason}"
    if engine.source is not None:
        yield "source", engine.source
    if engine.state is not None:
        yield "on disk", _on_disk(engine)
    if engine.draft is not None:
        yield "draft model", engine.draft.source or "none named"
        yield "on disk", _on_disk(engine.draft)
    for name, files in engine.adapters.items():
        yield f"adapter {name}", files.source or "none named"
        yield "on disk", _on_disk(files)
    if engine.plan is not None:
        yield from _plan_rows(engine.plan)


def _plan_rows(plan: PlacementPlan) -> Iterator[tuple[str, str]]:
    if plan.problem is not None:
        yield "memory", plan.problem
        return
    if plan.context_length:
        trained = f" of {plan.trained_length:,}" if plan.context_length < plan.trained_length else ""
        yield "context", f"{plan.context_length:,}{trained} tokens{f': {plan.limit}' if plan.limit else ''}"
        kind = f", KV cache {plan.kv_type}" if plan.kv_type else ""
        yield "slots", f"{plan.cache if plan.kv == 'pool' else plan.slots}{kind}"
        if plan.kv_reason:
            yield "pool", plan.kv_reason
    if plan.layers and (len(plan.layers) > 1 or "RAM" not in plan.layers):
        yield "layers", layers_in_words(plan.layers, plan.experts_in_ram)
    chosen = {key: value for key, value in plan.settings.items() if key not in _SHOWN}
    if chosen:
        yield "settings", ", ".join(f"{key} {value}" for key, value in chosen.items())
    places = ((name.replace("memory", "RAM"), _gb(size)) for name, size in plan.memory.items())
    yield "memory", ", ".join(f"{size} of {name}" for name, size in places)
    for note in plan.notes:
        yield "note", note


def _on_disk(files: FileState) -> str:
    if files.state == "absent":
        return "no"
    whole = "yes" if files.state == "present" else f"in part, {_gb(files.bytes)} of {_gb(files.total)}"
    size = f", {_gb(files.bytes)}" if files.state == "present" else ""
    revision = f", revision {files.revision[:12]}" if files.revision else ""
    return f"{whole}{size}, {files.path}{revision}{', read-only' if files.read_only else ''}"


def _gb(size: int | None) -> str:
    return f"{size / 1e9:.2f} GB" if size is not None else "an unknown size"
