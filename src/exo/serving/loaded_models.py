"""Models in memory: those loaded at the start, and unloading."""

import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, final

import anyio

from exo.cards.card import ModelCard
from exo.cards.catalogue import LiveCatalogue
from exo.chat.template.renderer import TemplateError, TemplateWorker
from exo.serving.errors import ServingError, unknown_model
from exo.serving.routing import Routing
from exo.store.progress import DownloadProgress
from exo.worker.protocol.events import Capabilities
from exo.worker.protocol.remote_host import LOCAL
from exo.worker.router import Route
from exo.worker.supervisor.instance import InstanceReport, settings_digest
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.runner_process import RunnerProcess

if TYPE_CHECKING:
    from exo.worker.supervisor.pool import RunnerPool

log = logging.getLogger(__name__)

_REPLICA_SECONDS = 60.0
"""Time between two attempts to load a replica that fails."""

EnsureFiles = Callable[[Route, ModelCard], AsyncGenerator[DownloadProgress]]


@final
class LoadedModels:
    """Loads models ahead of their first request, and unloads them."""

    def __init__(
        self,
        cards: LiveCatalogue,
        routing: Routing,
        pool: "RunnerPool",
        ensure_files: EnsureFiles,
        templates: TemplateWorker,
        drain_seconds: float,
    ) -> None:
        """``drain_seconds`` is how long the requests of a model may continue once it is to be unloaded."""
        self.start_failures: dict[str, str] = {}  # by the model as it was requested
        self._cards = cards
        self._routing = routing
        self._pool = pool
        self._ensure_files = ensure_files
        self._templates = templates
        self._drain_seconds = drain_seconds
        self._replicas: dict[tuple[str, str], float] = {}  # by model and host: no replica is loaded before this time

    async def load(self, model: str) -> None:
        """Loads a model and compiles its chat template. A failure is logged and added to ``start_failures``."""
        try:
            requested = self._routing.resolve(model)
            chosen = await self._routing.choose(requested)
            capabilities = await self._load(chosen, requested.card)
            if capabilities.chat_template is not None:
                await self._templates.prepare(capabilities.chat_template)
        except (ServingError, RunnerError, TemplateError) as error:
            log.error("%s: %s", model, error)
            self.start_failures[model] = str(error)
        except Exception as error:
            log.exception("%s could not be loaded", model)
            self.start_failures[model] = f"internal error: {error!r}"

    async def load_replica(self, card: ModelCard, route: Route) -> None:
        """Loads one more instance of a model, unless that is under way or has just failed."""
        key, now = (card.model_id, route.host), anyio.current_time()
        if self._replicas.get(key, -math.inf) > now:
            return
        self._replicas[key] = math.inf
        log.info("%s has no free slot and is loaded on host %s as well", card.model_id, route.host or LOCAL)
        try:
            await self._load(route, card)
            self._replicas[key] = -math.inf
        except (ServingError, RunnerError) as error:
            log.warning("%s is not loaded on host %s: %s", card.model_id, route.host or LOCAL, error)
            self._replicas[key] = anyio.current_time() + _REPLICA_SECONDS
        except Exception:
            log.exception("%s could not be loaded on host %s", card.model_id, route.host or LOCAL)
            self._replicas[key] = anyio.current_time() + _REPLICA_SECONDS

    async def start(self, route: Route, card: ModelCard) -> RunnerProcess:
        """Starts a runner, unless it runs, once its files are there. Raises ``ServingError`` and ``RunnerError``."""
        async with aclosing(self._ensure_files(route, card)) as pull:
            async for _ in pull:
                pass
        return self._pool.acquire(route, card)

    async def _load(self, route: Route, card: ModelCard) -> Capabilities:
        process = await self.start(route, card)
        with self._pool.using(process):
            return await process.ready()

    async def unload(self, name: str, runner: str | None = None) -> tuple[str, bool]:
        """Unloads a model, from all runners or from one, when its requests have ended or their time is over.

        Returns its id and whether it was loaded or loading. A loaded model whose card is gone keeps the card's names.
        Raises ``ServingError``.
        """
        card = self._cards.known.get(name)
        model_id = self._started_as(name) if card is None else card.model_id
        unloaded = await self._pool.unload(model_id, self._drain_seconds, runner)
        if card is None and not unloaded:
            raise self._unknown(name)
        return model_id, unloaded > 0

    def _started_as(self, name: str) -> str:
        """The id of the only running model whose card had this name when it was started. Raises ``ServingError``."""
        cards = [each.card for each in self._pool.reports()]
        found = {card.model_id for card in cards if name in (card.model_id, *card.aliases)}
        if len(found) != 1:
            raise self._unknown(name)
        return found.pop()

    def _unknown(self, name: str) -> ServingError:
        return unknown_model(self._cards.known.unknown(name))

    def is_outdated(self, report: InstanceReport) -> bool:
        """Whether the model card has changed or gone since the instance was started."""
        card = self._cards.known.get(report.now.model_id)
        return card is None or settings_digest(card, report.now.runner) != report.settings
