"""The router: a pure function from a request's needs and the state of the host to a runner, with an explanation.

Its criteria, in order: the runner that the request names, the card's ``runner``, the card's ``backends`` in their
order, the hosts' devices, the request's needs, repeated failures, measured speed where that is preferred, the room on
the hosts, and load. Each one only narrows the choice that the one before it left, so a request never overrules its
model card.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple, get_args

from exo.cards.card import ModelCard, Task
from exo.worker.host import Host
from exo.worker.protocol.events import Capabilities, RunnerState
from exo.worker.protocol.remote_host import LOCAL
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
    host: str = ""
    """The remote host where it runs; empty for this machine."""

    @property
    def place(self) -> str:
        """See ``Route.place``."""
        return place(self.runner, self.host)

    @property
    def is_full(self) -> bool:
        """Whether another request would wait for a slot."""
        return self.active + self.waiting >= max(self.slots, 1)


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
    host: str = ""
    """The remote host where it runs; empty for this machine."""
    replica: str | None = None
    """The host where one more instance should be loaded, because all that there are have no free slot."""

    @property
    def place(self) -> str:
        """Runner and host, such as "cuda@gpu2"; the runner alone for this machine."""
        return place(self.runner, self.host)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no runner gets a request. ``param`` is the request's parameter at fault."""

    code: RefusalCode
    message: str
    param: str


def place(runner: str, host: str) -> str:
    """See ``Route.place``."""
    return f"{runner}@{host}" if host else runner


@dataclass(frozen=True, slots=True)
class RemoteHosts:
    """The remote hosts that can be used now, and what the choice between hosts depends on."""

    hosts: Mapping[str, Host] = field(default_factory=dict[str, Host])
    """By name, in the order of the user's file."""
    down: Mapping[str, str] = field(default_factory=dict[str, str])
    """Why the others cannot be used, by name."""
    full: Collection[tuple[str, str]] = ()
    """Backend and host, where the model does not fit beside those that are loaded."""
    cached_on: str | None = None
    """The instance that has computed the longest prefix of the request."""


NO_REMOTE_HOSTS = RemoteHosts()


def parse_model(model: str) -> Wish:
    """Splits "gemma-3-270m@cuda" at its last "@". Without one, any runner will do."""
    name, at, runner = model.rpartition("@")
    return Wish(name, runner) if at else Wish(model, None)


def adapter_not_found(card: ModelCard, adapter: str) -> Refusal:
    """The refusal of a name that is a model card's with the name of an adapter that the card does not have."""
    known = ", ".join(card.adapters)
    return Refusal("model_not_found", f"{card.model_id} has no adapter {adapter!r}; it has {known}", "model")


def route(
    wish: str | None,
    card: ModelCard,
    host: Host,
    live: Iterable[LiveRunner],
    needs: Mapping[Need, str],
    failing: Collection[str] = (),
    preference: Preference | None = None,
    adapters: Sequence[str] = (),
    remote: RemoteHosts | None = None,
) -> Route | Refusal:
    """Chooses the runner of a request.

    ``wish`` is the runner that the request names, if any. ``needs`` maps each need of the request to the parameter that
    causes it. The order of ``live`` does not matter. ``failing`` are places where runners keep dying with this model;
    they are the last resort. With a ``preference``, measured speed decides between runners that have loaded the model.
    ``adapters`` are those of the card that the request uses. ``remote`` are the other machines; None asks about this
    one alone, whatever hosts the card names.
    """
    if wish is not None and wish not in RUNNERS:
        return Refusal("runner_not_found", f"there is no runner {wish!r}; known are {', '.join(RUNNERS)}", "model")
    tasks = next((_TASKS[need] for need in NEEDS if need in needs and need in _TASKS), _GENERATION)
    if not set(tasks) & set(card.tasks):
        message = (
            f"{card.model_id} is for {', '.join(card.tasks) or 'nothing'}; this request needs {' or '.join(tasks)}"
        )
        return Refusal("unsupported_task", message, "model")
    if adapters and tasks is not _GENERATION:
        message = f"adapters change generated text only; name {card.model_id} without {adapters[0]!r}"
        return Refusal("unsupported_parameter", message, "model")
    mine = [each for each in live if each.model_id == card.model_id and each.state not in _GONE]
    places = [("", host)] if remote is None else _places(card, host, remote)
    remote = remote or NO_REMOTE_HOSTS
    candidates = [
        _examine(backend, wish, card, each, name, mine, needs, adapters)
        for backend in card.backends
        for name, each in places
    ]
    possible = [each for each in candidates if each.hurdle is None]
    if not possible:
        return _refuse(wish, card, dict(places), remote, candidates, needs)
    willing = [each for each in possible if each.place not in failing] or possible
    able = [each for each in mine if not _lacking(_offer(each, card), needs)]
    loaded = {each.runner for each in able if each.state in _READY}
    runners = tuple(dict.fromkeys(each.runner for each in willing))
    picked: Pick | None = None
    if preference is not None and tasks is _GENERATION and len(runners) > 1:
        picked = pick([each for each in runners if each in loaded], preference)
    chosen = next((each for each in willing if picked is not None and each.runner == picked.runner), willing[0])
    hosts = {each.host: each for each in willing if (each.backend, each.runner) == (chosen.backend, chosen.runner)}
    instances = [each for each in able if each.runner == chosen.runner and each.host in hosts]
    roomy = [name for name in hosts if (chosen.backend, name) not in remote.full]
    best = min(instances, key=partial(_rank, cached_on=remote.cached_on)) if instances else None
    chosen = hosts[best.host] if best is not None else hosts[next(iter(roomy or hosts))]
    left_out = {each.place for each in possible} - {each.place for each in willing}
    full = remote.full if best is None else ()
    passed_over = list(_passed_over(candidates, chosen, left_out, loaded, full))
    return Route(
        runner=chosen.runner,
        instance=None if best is None else best.instance,
        backend=chosen.backend,
        reason=_explain(wish, card, chosen, passed_over, picked),
        basis="order" if picked is None else picked.basis,
        criterion=_criterion(wish, card, picked, passed_over=bool(passed_over), left_out=bool(left_out)),
        host=chosen.host,
        replica=_replica(card, instances, roomy),
    )


def _places(card: ModelCard, host: Host, remote: RemoteHosts) -> list[tuple[str, Host]]:
    """The hosts that may serve the card, in order: those that it names, or else this machine and then all others."""
    known = {"": host, **remote.hosts}
    if card.hosts is None:
        return list(known.items())
    wanted = ("" if name == LOCAL else name for name in card.hosts)
    return [(name, known[name]) for name in wanted if name in known]


def _replica(card: ModelCard, instances: Sequence[LiveRunner], roomy: Sequence[str]) -> str | None:
    """The host for one more instance when none has a free slot or is about to have one."""
    most = math.inf if card.replicas == "auto" else card.replicas
    if not instances or len(instances) >= most or not all(each.state in _READY and each.is_full for each in instances):
        return None
    return next((name for name in roomy if all(each.host != name for each in instances)), None)


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
    host: str = ""

    @property
    def place(self) -> str:
        return place(self.runner, self.host)

    @property
    def subject(self) -> str:
        """The backend, and where it is."""
        return f"{self.backend} on {self.host}" if self.host else self.backend


def _examine(
    backend: str,
    wish: str | None,
    card: ModelCard,
    host: Host,
    name: str,
    mine: Sequence[LiveRunner],
    needs: Mapping[Need, str],
    adapters: Sequence[str],
) -> _Candidate:
    """``name`` is the host's, empty for this machine."""
    runner = next((name for name, spec in RUNNERS.items() if backend in spec.backends), "")
    if wish not in (None, runner) or card.runner not in ("auto", runner):
        return _Candidate(backend, runner, "excluded", "is not for the runner asked for", host=name)
    if not runner:
        return _Candidate(backend, runner, "unserved", "is served by no runner of this version", host=name)
    probe = host.probes.get(runner)
    where = "there" if name else "here"
    if probe is None or not probe.installed:
        why = f"needs runner {runner}, which is not installed {where}"
        return _Candidate(backend, runner, "host", why, host=name)
    if backend not in probe.backends:
        return _Candidate(backend, runner, "host", f"has no device {where}", host=name)
    # A loaded instance shows what the model can do; a new instance of it could do the same.
    offers = [_offer(each, card) for each in mine if each.runner == runner and each.capabilities is not None]
    lacking = min(_lacking(offer, needs) for offer in offers or [_features(runner, card)])
    if lacking:
        return _Candidate(backend, runner, "needs", f"does not support {lacking[0]}", lacking[0], name)
    absent = next((each for each in adapters if runner not in card.adapters.get(each, ())), None)
    if absent is not None:
        why = f"has no adapter {absent!r} in [{runner}] of the model card"
        return _Candidate(backend, runner, "adapter", why, host=name)
    return _Candidate(backend, runner, host=name)


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


def _rank(each: LiveRunner, cached_on: str | None) -> tuple[bool, bool, float, str]:
    """Ready before loading, then the one with the request's prefix if it has a free slot, then by requests per slot.

    The instance's name only makes the order total.
    """
    no_prefix = each.instance != cached_on or each.is_full
    return each.state not in _READY, no_prefix, (each.active + each.waiting) / max(each.slots, 1), each.instance


def _passed_over(
    candidates: Sequence[_Candidate],
    chosen: _Candidate,
    left_out: Collection[str],
    loaded: Collection[str],
    full: Collection[tuple[str, str]],
) -> Iterator[_Candidate]:
    """The candidates before the chosen one that were not compared with it by speed, each with the reason.

    ``left_out`` are the failing places, ``full`` the backends and hosts without room.
    """
    for each in candidates[: candidates.index(chosen)]:
        if each.hurdle is None and each.place in left_out:
            yield replace(each, why=f"is left out while runner {each.runner} keeps failing")
        elif each.hurdle is None and each.backend == chosen.backend:
            if (each.backend, each.host) in full:
                yield replace(each, why="has no room for it")
        elif each.hurdle is None and each.runner not in loaded:
            yield replace(each, why="is not loaded")
        elif each.hurdle not in (None, "excluded"):
            yield each


def _explain(
    wish: str | None, card: ModelCard, chosen: _Candidate, passed_over: Sequence[_Candidate], picked: Pick | None
) -> str:
    if picked is not None and picked.runner is not None:
        others = (f"{each.subject} {each.why}" for each in passed_over)
        return "; ".join([f"{picked.why}, so {chosen.subject} is chosen", *others])
    first, *others = (*passed_over, chosen)
    if wish is not None:
        opening = f"request asks for runner {wish}; {first.subject} {first.why}"
    elif card.runner != "auto":
        opening = f"card asks for runner {card.runner}; {first.subject} {first.why}"
    else:
        opening = f"card prefers {first.subject}, which {first.why}"
    between = [f"{each.subject} {each.why}" for each in others[:-1]]
    last = [f"{chosen.subject} is next and available"] if others else []
    return "; ".join([opening, *between, *last, *([] if picked is None else [picked.why])])


def _refuse(
    wish: str | None,
    card: ModelCard,
    places: Mapping[str, Host],
    remote: RemoteHosts,
    candidates: Sequence[_Candidate],
    needs: Mapping[Need, str],
) -> Refusal:
    """Names the hurdle of the backends that got furthest: a missing feature, a missing device, or an exclusion."""
    asked = wish or (card.runner if card.runner != "auto" else None)
    subject = f"runner {asked} cannot" if asked else "no runner can"
    down = [f"host {name} {why}" for name, why in remote.down.items() if card.hosts is None or name in card.hosts]
    if not candidates:
        known = [name for name in card.hosts or () if name not in remote.down]
        absent = [f"no host is called {name}" for name in known]
        message = f"{card.model_id} is for hosts {', '.join(card.hosts or ())}: {'; '.join([*down, *absent])}"
        return Refusal("runner_unavailable", message, "model")
    tried = "; ".join([*(f"{each.subject} {each.why}" for each in candidates if each.hurdle != "excluded"), *down])
    need: Need | None = next((each.need for each in candidates if each.need is not None), None)
    if need is not None:
        param = needs[need]
        message = f"parameter {param!r} needs {need}, and {subject} do that for {card.model_id} here: {tried}"
        return Refusal("unsupported_parameter", message, param)
    if any(each.hurdle == "adapter" for each in candidates):
        param = needs.get("adapter_scales", "model")
        return Refusal("unsupported_parameter", f"{subject} use that adapter of {card.model_id} here: {tried}", param)
    absent = dict.fromkeys((each.runner, each.host) for each in candidates if each.hurdle == "host")
    if absent:
        probes = [places[name].probes[runner] for runner, name in absent if runner in places[name].probes]
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
