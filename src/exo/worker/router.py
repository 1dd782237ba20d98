"""The router: a pure function from a request's needs and the state of the host to a runner, with an explanation.

Its criteria, in order: the runner that the request names, the card's ``runner``, the card's ``backends`` in their
order, the host's devices, the request's needs, repeated failures, measured speed where that is preferred, and load.
Each one only narrows the choice that the one before it left, so a request never overrules its model card.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

from exo.cards.card import ModelCard, Task
from exo.worker.host import Host
from exo.worker.protocol.events import Capabilities, RunnerState
from exo.worker.protocol.runners import RUNNERS, Need
from exo.worker.speed import Basis, Pick, Preference, pick

RefusalCode = Literal[
    "model_not_found", "runner_not_found", "unsupported_task", "runner_unavailable", "unsupported_parameter"
]

Criterion = Literal["requested", "card", "preferred", "next", "failing", "measured", "trial"]
"""What decided a route: the request's wish, the card's ``runner``, the card's first backend, the first one that is
available, one that keeps failing before it, measured speed, or the need to measure."""

NEEDS: tuple[Need, ...] = get_args(Need)
_GENERATION: tuple[Task, ...] = ("TextGeneration",)
_TASKS: dict[Need, tuple[Task, ...]] = {"embeddings": ("TextEmbedding", *_GENERATION), "rerank": ("TextRanking",)}
"""For a request that does not generate text: the tasks of which its card must have one."""
_READY: tuple[RunnerState, ...] = ("Ready", "Running")
_GONE: tuple[RunnerState, ...] = ("ShuttingDown", "Shutdown", "Failed")


class Wish(NamedTuple):
    """The ``model`` of a request: a card's name, and perhaps a runner's."""

    name: str
    runner: str | None


@dataclass(frozen=True, slots=True)
class LiveRunner:
    """A runner process. ``active`` and ``waiting`` count requests; ``slots`` is 0 until the model is loaded."""

    runner: str
    instance: str
    """Unique among the live runners."""
    model_id: str
    state: RunnerState
    slots: int
    active: int
    waiting: int
    capabilities: Capabilities | None
    """None until the model is loaded."""


@dataclass(frozen=True, slots=True)
class Route:
    """The runner of a request. ``instance`` is None if the runner has to be started."""

    runner: str
    instance: str | None
    backend: str
    reason: str
    """One sentence for the user, in printable ASCII because it becomes a header."""
    basis: Basis = "order"
    criterion: Criterion = field(default="preferred", compare=False)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no runner gets a request. ``param`` is the request's parameter at fault."""

    code: RefusalCode
    message: str
    param: str


def parse_model(model: str) -> Wish:
    """Splits "gemma-3-270m@cuda" at its last "@". Without one, any runner will do."""
    name, at, runner = model.rpartition("@")
    return Wish(name, runner) if at else Wish(model, None)


def adapter_not_found(card: ModelCard, adapter: str) -> Refusal:
    """The refusal of a name that is a model card's with the name of an adapter that the card does not have."""
    known = ", ".join(card.adapters)
    return Refusal("model_not_found", f"{card.model_id} has no adapter {adapter!r}; it has {known}", "model")


def model_not_found(name: str, suggestions: Sequence[str] = ()) -> Refusal:
    """The refusal of a name without a model card."""
    hint = f"; did you mean {' or '.join(suggestions)}?" if suggestions else ""
    return Refusal("model_not_found", f"no model card is called {name!r}{hint}", "model")


def route(
    wish: str | None,
    card: ModelCard,
    host: Host,
    live: Iterable[LiveRunner],
    needs: Mapping[Need, str],
    failing: Collection[str] = (),
    preference: Preference | None = None,
    adapter: str = "",
) -> Route | Refusal:
    """Chooses the runner of a request.

    ``wish`` is the runner that the request names, if any. ``needs`` maps each need of the request to the parameter that
    causes it. The order of ``live`` does not matter. ``failing`` are runners that keep dying with this model; they are
    the last resort. With a ``preference``, measured speed decides between runners that have loaded the model.
    ``adapter`` is one of the card's, if the request names one.
    """
    if wish is not None and wish not in RUNNERS:
        return Refusal("runner_not_found", f"there is no runner {wish!r}; known are {', '.join(RUNNERS)}", "model")
    tasks = next((_TASKS[need] for need in NEEDS if need in needs and need in _TASKS), _GENERATION)
    if not set(tasks) & set(card.tasks):
        message = (
            f"{card.model_id} is for {', '.join(card.tasks) or 'nothing'}; this request needs {' or '.join(tasks)}"
        )
        return Refusal("unsupported_task", message, "model")
    if adapter and tasks is not _GENERATION:
        message = f"adapters change generated text only; name {card.model_id} without {adapter!r}"
        return Refusal("unsupported_parameter", message, "model")
    mine = [each for each in live if each.model_id == card.model_id and each.state not in _GONE]
    candidates = [_examine(backend, wish, card, host, mine, needs, adapter) for backend in card.backends]
    possible = [each for each in candidates if each.hurdle is None]
    if not possible:
        return _refuse(wish, card, host, candidates, needs)
    willing = [each for each in possible if each.runner not in failing] or possible
    able = [each for each in mine if not _lacking(_offer(each, card), needs)]
    loaded = {each.runner for each in able if each.state in _READY}
    runners = tuple(dict.fromkeys(each.runner for each in willing))
    picked: Pick | None = None
    if preference is not None and tasks is _GENERATION and len(runners) > 1:
        picked = pick([each for each in runners if each in loaded], preference)
    chosen = next((each for each in willing if picked is not None and each.runner == picked.runner), willing[0])
    instances = [each for each in able if each.runner == chosen.runner]
    left_out = {each.runner for each in possible} - {each.runner for each in willing}
    passed_over = list(_passed_over(candidates[: candidates.index(chosen)], left_out, loaded))
    return Route(
        runner=chosen.runner,
        instance=min(instances, key=_rank).instance if instances else None,
        backend=chosen.backend,
        reason=_explain(wish, card, chosen, passed_over, picked),
        basis="order" if picked is None else picked.basis,
        criterion=_criterion(wish, card, picked, passed_over=bool(passed_over), left_out=bool(left_out)),
    )


def _criterion(
    wish: str | None, card: ModelCard, picked: Pick | None, *, passed_over: bool, left_out: bool
) -> Criterion:
    if wish is not None:
        return "requested"
    if card.runner != "auto":
        return "card"
    if picked is not None and picked.basis != "order":
        return "trial" if picked.basis == "trial" else "measured"
    if left_out:
        return "failing"
    return "next" if passed_over else "preferred"


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A backend and its first hurdle, if any. ``why`` is the backend's predicate, as in "has no device here"."""

    backend: str
    runner: str
    """The runner that serves it; empty if none does."""
    hurdle: Literal["excluded", "unserved", "host", "needs", "adapter"] | None = None
    why: str = "is available"
    need: Need | None = None


def _examine(
    backend: str,
    wish: str | None,
    card: ModelCard,
    host: Host,
    mine: Sequence[LiveRunner],
    needs: Mapping[Need, str],
    adapter: str,
) -> _Candidate:
    runner = next((name for name, spec in RUNNERS.items() if backend in spec.backends), "")
    if wish not in (None, runner) or card.runner not in ("auto", runner):
        return _Candidate(backend, runner, "excluded", "is not for the runner asked for")
    if not runner:
        return _Candidate(backend, runner, "unserved", "is served by no runner of this version")
    probe = host.probes.get(runner)
    if probe is None or not probe.installed:
        return _Candidate(backend, runner, "host", f"needs runner {runner}, which is not installed here")
    if backend not in probe.backends:
        return _Candidate(backend, runner, "host", "has no device here")
    # A loaded instance shows what the model can do; a new instance of it could do the same.
    offers = [_offer(each, card) for each in mine if each.runner == runner and each.capabilities is not None]
    lacking = min(_lacking(offer, needs) for offer in offers or [_features(runner, card)])
    if lacking:
        return _Candidate(backend, runner, "needs", f"does not support {lacking[0]}", lacking[0])
    if adapter and runner not in card.adapters.get(adapter, ()):
        return _Candidate(backend, runner, "adapter", f"has no adapter {adapter!r} in [{runner}] of the model card")
    return _Candidate(backend, runner)


def _features(runner: str, card: ModelCard) -> frozenset[Need]:
    """The features of a kind of runner with such a card."""
    spec, table = RUNNERS[runner], card.engines.get(runner, {})
    features = spec.features - {feature for feature, key in spec.keys.items() if not table.get(key)}
    return features - spec.exclusive_tasks if set(_GENERATION) & set(card.tasks) else features


def _offer(each: LiveRunner, card: ModelCard) -> frozenset[Need]:
    """The features of a live runner; until its model is loaded, those of its kind."""
    if each.capabilities is None:
        return _features(each.runner, card)
    return frozenset(need for need in NEEDS if getattr(each.capabilities, need))


def _lacking(offer: frozenset[Need], needs: Mapping[Need, str]) -> list[Need]:
    return [need for need in NEEDS if need in needs and need not in offer]


def _rank(each: LiveRunner) -> tuple[bool, float, str]:
    """Ready before loading, then by requests per slot. The instance's name only makes the order total."""
    return each.state not in _READY, (each.active + each.waiting) / max(each.slots, 1), each.instance


def _passed_over(
    before: Sequence[_Candidate], left_out: Collection[str], loaded: Collection[str]
) -> Iterator[_Candidate]:
    """The backends before the chosen one that were not compared with it by speed, each with the reason.

    ``left_out`` are the failing runners.
    """
    for each in before:
        if each.hurdle is None and each.runner in left_out:
            yield replace(each, why=f"is left out while runner {each.runner} keeps failing")
        elif each.hurdle is None and each.runner not in loaded:
            yield replace(each, why="is not loaded")
        elif each.hurdle not in (None, "excluded"):
            yield each


def _explain(
    wish: str | None, card: ModelCard, chosen: _Candidate, passed_over: Sequence[_Candidate], picked: Pick | None
) -> str:
    if picked is not None and picked.runner is not None:
        others = (f"{each.backend} {each.why}" for each in passed_over)
        return "; ".join([f"{picked.why}, so {chosen.backend} is chosen", *others])
    first, *others = (*passed_over, chosen)
    if wish is not None:
        opening = f"request asks for runner {wish}; {first.backend} {first.why}"
    elif card.runner != "auto":
        opening = f"card asks for runner {card.runner}; {first.backend} {first.why}"
    else:
        opening = f"card prefers {first.backend}, which {first.why}"
    between = [f"{each.backend} {each.why}" for each in others[:-1]]
    last = [f"{chosen.backend} is next and available"] if others else []
    return "; ".join([opening, *between, *last, *([] if picked is None else [picked.why])])


def _refuse(
    wish: str | None, card: ModelCard, host: Host, candidates: Sequence[_Candidate], needs: Mapping[Need, str]
) -> Refusal:
    """Names the hurdle of the backends that got furthest: a missing feature, a missing device, or an exclusion."""
    asked = wish or (card.runner if card.runner != "auto" else None)
    subject = f"runner {asked} cannot" if asked else "no runner can"
    tried = "; ".join(f"{each.backend} {each.why}" for each in candidates if each.hurdle != "excluded")
    need: Need | None = next((each.need for each in candidates if each.need is not None), None)
    if need is not None:
        param = needs[need]
        message = f"parameter {param!r} needs {need}, and {subject} do that for {card.model_id} here: {tried}"
        return Refusal("unsupported_parameter", message, param)
    if any(each.hurdle == "adapter" for each in candidates):
        return Refusal("unsupported_parameter", f"{subject} use that adapter of {card.model_id} here: {tried}", "model")
    absent = dict.fromkeys(each.runner for each in candidates if each.hurdle == "host")
    if absent:
        probes = [host.probes[runner] for runner in absent if runner in host.probes]
        notes = "".join(f"; {note}" for probe in probes for note in probe.notes)
        remedies = "".join(f"; to fix it: {probe.remedy}" for probe in probes if probe.remedy)
        return Refusal("runner_unavailable", f"{subject} serve {card.model_id} here: {tried}{notes}{remedies}", "model")
    return Refusal("runner_unavailable", _why_excluded(wish, card), "model")


def _why_excluded(wish: str | None, card: ModelCard) -> str:
    backends = ", ".join(card.backends)
    if wish is None:
        known = ", ".join(backend for spec in RUNNERS.values() for backend in spec.backends)
        return f"no runner serves any backend of {card.model_id}, which are {backends}; runners serve {known}"
    if card.runner not in ("auto", wish):
        return f"the card of {card.model_id} asks for runner {card.runner}, so runner {wish} may not serve it"
    served = ", ".join(RUNNERS[wish].backends)
    return f"runner {wish} serves {served}, and the card of {card.model_id} lists only {backends}"
