"""From the model that a request names to its model card and a runner."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, final

from exo.cards.card import ModelCard
from exo.cards.catalogue import LiveCatalogue
from exo.serving.admission import Queues
from exo.serving.errors import RequestError, ServingError, unknown_model
from exo.serving.hosts.prober import HostProber
from exo.serving.request import RequestedModel
from exo.worker.host import Host
from exo.worker.protocol.commands import UsedAdapter
from exo.worker.protocol.runners import Need, Prefer
from exo.worker.router import (
    NO_REMOTE_HOSTS,
    Refusal,
    RemoteHosts,
    Route,
    Wish,
    adapter_not_found,
    parse_model,
    route,
)
from exo.worker.speed import Preference
from exo.worker.supervisor.speed_store import SpeedStore

if TYPE_CHECKING:  # both are given to it
    from exo.serving.hosts.links import HostLinks
    from exo.worker.supervisor.pool import RunnerPool


@final
class Routing:
    """Resolves model names, and chooses runners from the state of the host, the runners and their speed."""

    def __init__(
        self,
        cards: LiveCatalogue,
        prober: HostProber,
        links: "HostLinks | None",
        pool: "RunnerPool",
        queues: Queues,
        speeds: SpeedStore,
        prefer: Prefer | None,
    ) -> None:
        """``prefer`` applies to model cards that do not state a preference."""
        self._cards = cards
        self._prober = prober
        self._links = links
        self._pool = pool
        self._queues = queues
        self._speeds = speeds
        self._prefer: Prefer | None = prefer

    def parse(self, model: str, tag: str = "") -> Wish:
        """Splits "name@runner". ``tag`` is removed from the end of a name that no model card has."""
        if tag and ("@" in model or self._cards.known.get(model) is None):
            model = model.removesuffix(tag)
        return parse_model(model)

    def resolve(self, model: str, tag: str = "") -> RequestedModel:
        """Finds a request's model: a model id or alias, then perhaps ":adapter" and "@runner"; ``tag`` as in ``parse``.

        An empty ``model`` means the only loaded model, or else the only known one. Raises ``ServingError``.
        """
        name, runner = self.parse(model or self._only_model(), tag)
        card, adapter = self._cards.known.with_adapter(name)
        if card is None:
            raise unknown_model(self._cards.known.unknown(name))
        if adapter and adapter not in card.adapters:
            raise _from_refusal(adapter_not_found(card, adapter))
        return RequestedModel(card, runner, adapter, (UsedAdapter(name=adapter),) if adapter else ())

    def _only_model(self) -> str:
        loaded = sorted({each.model_id for each in self._pool.live()})
        found = loaded or list(self._cards.known.cards)
        if len(found) == 1:
            return found[0]
        message = f"model: this field is required; loaded are {', '.join(loaded) or 'none'}"
        raise RequestError(message[:1000], code="missing_parameter", param="model")

    async def choose(
        self,
        model: RequestedModel,
        needs: Mapping[Need, str] | None = None,
        arriving: int = 0,
        cached_on: str | None = None,
    ) -> Route:
        """The route of a request. Waits until the host has been probed. Raises ``ServingError``.

        ``needs`` is passed to ``router.route``; None means what the model card is for. ``arriving`` is the number of
        the request's sequences if it has no place in the queue yet. ``cached_on`` is the instance that has computed the
        longest prefix of its prompt.
        """
        if self._links is not None:
            await self._links.tried()
        decision = self._decide(model, self._prober.host or await self._prober.first(), needs, arriving, cached_on)
        if isinstance(decision, Refusal) and decision.code == "runner_unavailable":
            decision = self._decide(model, await self._prober.probe_again(), needs, arriving, cached_on)
        if isinstance(decision, Refusal):
            raise _from_refusal(decision, runner_requested=model.runner is not None)
        return decision

    def _decide(
        self,
        model: RequestedModel,
        host: Host,
        needs: Mapping[Need, str] | None,
        arriving: int,
        cached_on: str | None,
    ) -> Route | Refusal:
        card = model.card
        prefer = card.prefer or self._prefer
        preference: Preference | None = None
        if prefer is not None:
            preference = self._speeds.preference(card, prefer, self._load(card, arriving), time.time())
        live, failing = self._pool.live_for(card), self._pool.history.avoided(card)
        needs = card.needs if needs is None else needs
        remote = NO_REMOTE_HOSTS if self._links is None else self._remote(self._links, card, cached_on)
        names = tuple(each.name for each in model.adapters)
        return route(model.runner, card, host, live, needs, failing, preference, names, remote)

    def _remote(self, links: "HostLinks", card: ModelCard, cached_on: str | None) -> RemoteHosts:
        up = links.up
        full = [
            (backend, host)
            for backend in card.backends
            for host in ("", *up)
            if not self._pool.has_room(card, backend, host)
        ]
        return RemoteHosts(up, links.down, full, cached_on)

    def sent(self, card: ModelCard, route: Route) -> None:
        """Notes that a request has taken this route; later decisions depend on it."""
        if route.basis != "order":
            self._speeds.count_request(card.model_id, route.runner, self._load(card), route.basis)

    def _load(self, card: ModelCard, arriving: int = 0) -> int:
        """The sequences of a model that are running, waiting or arriving."""
        return max(1, self._queues.held(card.model_id) + arriving)


def _from_refusal(refusal: Refusal, *, runner_requested: bool = True) -> ServingError:
    """The router's refusal. If the request names no runner, its client cannot fix an unavailable one."""
    fixable = runner_requested or refusal.code != "runner_unavailable"
    kind = RequestError if fixable else ServingError
    return kind(refusal.message, code=refusal.code, param=refusal.param)
