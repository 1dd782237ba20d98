"""Lists faults of the models on this machine, and notes on the quality of their output, for ``exo doctor``."""

from collections.abc import Iterator

import anyio
from pydantic import BaseModel, ConfigDict

from exo.cards.catalogue import Catalogue
from exo.cli.models.show import EngineRow, placement_plan, show_model
from exo.config import Settings
from exo.store.store import Store
from exo.worker.host import Host

_AT_ONCE = 2
"""The most runners that read model files at the same time."""


class ModelFinding(BaseModel):
    """One model with one runner."""

    model_config = ConfigDict(frozen=True)

    model_id: str
    runner: str
    problem: str | None
    """Why it cannot be loaded."""
    notes: tuple[str, ...]


async def findings(catalogue: Catalogue, store: Store, host: Host, settings: Settings) -> tuple[ModelFinding, ...]:
    """Asks each runner that can serve a model of which files are on disk. Has no entry where all is well.

    Models of other programs are left out: there may be hundreds, and each takes the start of a runner.
    """
    limit = anyio.CapacityLimiter(_AT_ONCE)
    cards = [card for model_id, card in catalogue.cards.items() if model_id not in catalogue.found]
    shown = [show_model(card, catalogue, store, host) for card in cards]
    found: dict[tuple[str, str], ModelFinding] = {}

    async def ask(model_id: str, engine: EngineRow) -> None:
        async with limit:
            plan = await placement_plan(engine, catalogue.cards[model_id], host, settings)
        if plan is not None and (plan.problem or plan.notes):
            found[model_id, engine.runner] = ModelFinding(
                model_id=model_id, runner=engine.runner, problem=plan.problem, notes=plan.notes
            )

    async with anyio.create_task_group() as tasks:
        for model in shown:
            for engine in model.engines:
                if (lacking := _incomplete(engine)) is not None:
                    name = model.card.model_id
                    found[name, engine.runner] = ModelFinding(
                        model_id=name, runner=engine.runner, problem=lacking, notes=()
                    )
                else:
                    tasks.start_soon(ask, model.card.model_id, engine)
    return tuple(found[key] for key in sorted(found))


def as_text(found: tuple[ModelFinding, ...]) -> Iterator[str]:
    """Yields lines for the terminal; none without findings."""
    for each in found:
        yield ""
        yield f"model {each.model_id} with {each.runner}"
        if each.problem is not None:
            yield f"  problem {each.problem}"
        for note in each.notes:
            yield f"  note    {note}"


def _incomplete(engine: EngineRow) -> str | None:
    if engine.state != "partial":
        return None
    there = f"{engine.bytes / 1e6:,.0f}"
    whole = f" of {engine.total / 1e6:,.0f}" if engine.total else ""
    return f"its files are incomplete, {there}{whole} MB are at {engine.path}: exo pull continues the download"
