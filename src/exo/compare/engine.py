"""The engines to compare: runners that can serve the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exo.cards.card import ModelCard
from exo.compare.comparison import CompareError
from exo.worker.host import Host
from exo.worker.protocol.commands import Load
from exo.worker.protocol.runners import RUNNERS
from exo.worker.router import Refusal, route


@dataclass(frozen=True, slots=True)
class ComparedEngine:
    """A runner: its name, its command, and the model to load."""

    name: str
    command: tuple[str, ...]
    load: Load


def engine_names(card: ModelCard, wished: Sequence[str] | None) -> tuple[str, ...]:
    """The runners to compare. Default: all that serve one of the card's back ends. Raises CompareError."""
    serving = tuple(name for name, spec in RUNNERS.items() if set(spec.backends) & set(card.backends))
    names = serving if wished is None else tuple(wished)
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise CompareError(f"engines: {repeated} is named twice; each engine is compared once")
    if len(names) < 2:
        have = f"only {names[0]} is named" if names else "none is named"
        if wished is None:
            have = f"the card of {card.model_id} lists backends of {', '.join(names) or 'no runner'} alone"
        known = ", ".join(RUNNERS)
        raise CompareError(f"engines: a comparison needs at least two engines, and {have}; runners are {known}")
    return names


def choose_engine(
    name: str, card: ModelCard, host: Host, commands: Mapping[str, Sequence[str]], directories: Sequence[str]
) -> ComparedEngine:
    """The engine for ``card`` on this runner. Raises CompareError with the router's refusal."""
    decision = route(name, card, host, (), {})
    if isinstance(decision, Refusal):
        raise CompareError(f"engine {name}: {decision.message}")
    load = Load(
        model_id=card.model_id,
        backend=decision.backend,
        table=card.engines.get(name, {}),
        directories=tuple(directories),
    )
    return ComparedEngine(name, tuple(commands[name]), load)
