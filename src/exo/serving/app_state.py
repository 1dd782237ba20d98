"""The objects that serve requests, for the life of one server."""

import logging
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import anyio
from anyio.abc import TaskGroup
from anyio.to_thread import run_sync

from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue, LiveCatalogue
from exo.chat.grammar.gbnf import GbnfWorker
from exo.chat.template.renderer import TemplateWorker
from exo.config import Settings
from exo.serving.activity import Activity
from exo.serving.admission import Queues
from exo.serving.affinity import PrefixAffinity
from exo.serving.hosts.prober import HostProber
from exo.serving.loaded_models import LoadedModels
from exo.serving.pictures.prompt_pictures import Pictures
from exo.serving.pull_jobs import Pulls
from exo.serving.routing import Routing
from exo.store.progress import DownloadProgress
from exo.worker.host import Host, differing_engines, unused_gpus
from exo.worker.router import Route
from exo.worker.speed import Measurement
from exo.worker.supervisor.memory.host import capacity
from exo.worker.supervisor.pool import RunnerPool
from exo.worker.supervisor.speed_store import SpeedStore
from exo.worker.supervisor.watchdog import Deadlines

if TYPE_CHECKING:  # few servers have other hosts
    from exo.serving.hosts.links import HostLinks

log = logging.getLogger(__name__)

_CARDS_SECONDS = 1.0
"""Time between two looks at the files of model cards."""
_SAVE_SECONDS = 30.0
"""Time between two looks at whether there are new speed measurements."""


class Services:
    """Holds the objects, each with one job. They work while ``running`` lasts.

    ``commands`` start the runners, by name, if they are not the usual ones; with ``--probe`` each tells what it can do
    on this host. Such runners find their model files themselves.
    """

    def __init__(
        self, settings: Settings, catalogue: Catalogue, commands: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        limits = settings.limits
        self.cards = LiveCatalogue(catalogue)
        self.speeds = SpeedStore(settings.speeds_file)
        self.activity = Activity(keeps_prompts=settings.log_prompts)
        self.templates = TemplateWorker()
        self.gbnf = GbnfWorker()
        self.pictures = Pictures(settings.image_hosts)
        self.pulls = Pulls(settings, provides_files=commands is None)
        self.pool = RunnerPool(
            settings.models_directories,
            settings.log_directory,
            commands,
            Deadlines.of_load(limits.load_seconds),
            keep_seconds=limits.keep_seconds,
            on_measured=self._measured,
            hosts=settings.hosts,
            prefix_directory=settings.prefix_directory,
            residence_seconds=limits.residence_seconds,
            evict_seconds=limits.evict_seconds,
            force_load=limits.force_load,
        )
        self.affinity = PrefixAffinity()
        self.queues = Queues(limits.max_queue, self.pool.slots)
        self._prober = HostProber(commands, partial(self._set_host, limits.memory))
        self.links = _links(settings, self.pool)
        self._auto_pull = settings.auto_pull
        self._tasks: TaskGroup  # exists while the server runs
        self.routing = Routing(
            self.cards, self._prober, self.links, self.pool, self.queues, self.speeds, settings.prefer
        )
        self.models = LoadedModels(
            self.cards, self.routing, self.pool, self.ensure_files, self.templates, limits.drain_seconds
        )

    @property
    def host(self) -> Host | None:
        """The machine; None until it has been probed."""
        return self._prober.host

    @property
    def notices(self) -> list[str]:
        """Notes for the operator about this host, such as a GPU that is not used."""
        unused = unused_gpus(self._prober.host) if self._prober.host is not None else ""
        notices = [unused] if unused else []
        if self.links is not None:
            notices += (f"host {name} {why}" for name, why in self.links.down.items())
            notices += () if self._prober.host is None else differing_engines(self._prober.host, self.links.up)
        return notices

    def ensure_files(self, route: Route, card: ModelCard) -> AsyncGenerator[DownloadProgress]:
        """See ``Pulls.ensure``; on the host of the route."""
        if self.links is None or not route.host:
            return self.pulls.ensure(card, route.runner)
        return self.links.ensure(route.host, card, route.runner, allowed=self._auto_pull)

    def load_replica(self, card: ModelCard, route: Route) -> None:
        """Loads one more instance of a model in the background."""
        self._tasks.start_soon(self.models.load_replica, card, route)

    @asynccontextmanager
    async def running(self, load: Iterable[str] = ()) -> AsyncGenerator[None]:
        """Probes the host and loads the models ``load`` in the background; ends every process on leaving."""
        async with self.pool, self.pulls, anyio.create_task_group() as tasks:
            self._tasks = tasks
            tasks.start_soon(self._prober.run)
            if self.links is not None:
                tasks.start_soon(self.links.run)
            tasks.start_soon(self._save_speeds)
            tasks.start_soon(self._follow_cards)
            for model in load:
                tasks.start_soon(self.models.load, model)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()
                self.speeds.save(self.speeds.unsaved())
                await self.templates.aclose()
                await self.gbnf.aclose()
                await self.pictures.aclose()

    def _set_host(self, memory_limit: int | None, host: Host) -> None:
        self.pool.set_capacity(
            capacity(host, memory_limit),
            [each.id for each in host.nvidia_devices],
            ram_is_fixed=memory_limit is not None,
        )
        self.speeds.set_host(host)

    def _measured(self, card: ModelCard, runner: str, measurement: Measurement) -> None:
        self.speeds.add(card, runner, measurement, time.time())

    async def _save_speeds(self) -> None:
        while True:
            await anyio.sleep(_SAVE_SECONDS)
            try:
                await run_sync(self.speeds.save, self.speeds.unsaved())
            except Exception:
                log.exception("the measured speeds could not be saved")

    async def _follow_cards(self) -> None:
        """Looks at the files in a thread: the directory may be large, or on a slow network."""
        while True:
            try:
                await run_sync(self.cards.current, abandon_on_cancel=True)
            except Exception:
                log.exception("the files of the model cards could not be read; the cards stay as they are")
            await anyio.sleep(_CARDS_SECONDS)


def _links(settings: Settings, pool: RunnerPool) -> "HostLinks | None":
    if not settings.hosts:
        return None
    from exo.serving.hosts.links import HostLinks

    return HostLinks(settings.hosts, pool)
