"""What the routes work with, for the life of one server."""

import logging
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

import anyio
from anyio.to_thread import run_sync

from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue, LiveCatalogue
from exo.chat.grammar.gbnf import GbnfWorker
from exo.chat.template.renderer import TemplateError, TemplateWorker
from exo.config import Settings
from exo.serving.admission import Queues
from exo.serving.errors import RequestError, ServingError, from_refusal, unknown_model
from exo.serving.pull_jobs import OnProgress, Pulls
from exo.store.discover.description import Description
from exo.store.local import describe_on_disk
from exo.store.progress import DownloadProgress
from exo.store.store import Store
from exo.worker.host import Host, updated
from exo.worker.protocol.runners import Need
from exo.worker.router import Refusal, Route, parse_model, route
from exo.worker.speed import Measurement
from exo.worker.supervisor.host_memory import capacity
from exo.worker.supervisor.host_probe import PROBE_SECONDS, TRY_SECONDS, probe_host
from exo.worker.supervisor.instance import InstanceReport, settings_digest
from exo.worker.supervisor.pool import RunnerPool
from exo.worker.supervisor.runner_process import RunnerError
from exo.worker.supervisor.speed_store import SpeedStore
from exo.worker.supervisor.watchdog import Deadlines

log = logging.getLogger(__name__)

_PROBE_AGAIN_SECONDS = 30.0
"""After a probe, until a request that no runner can serve causes another."""
_LONGEST_PAUSE_SECONDS = 600.0
"""Between two probes of a runner that does not answer."""
_CARDS_SECONDS = 1.0
"""Between two looks at the files of model cards."""
_SAVE_SECONDS = 30.0
"""Between two looks at whether there are new measurements to be kept."""


class Services:
    """The catalogue, the runners, the workers for templates and GBNF, and what is known of the host.

    ``commands`` start the runners, by name, where they are not the usual ones; with ``--probe`` each tells what it can
    do here.
    """

    def __init__(
        self, settings: Settings, catalogue: Catalogue, commands: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self._catalogue = LiveCatalogue(catalogue)
        self.instances: RunnerPool
        """The runners; there are none but while the server is running."""
        self.queues = Queues(settings.limits.max_queue, self._slots)
        self.templates = TemplateWorker()
        self.gbnf = GbnfWorker()
        self.pulls: Pulls
        """Models on their way to the disk; there are none but while the server is running."""
        self.start_failures: dict[str, str] = {}
        """Why a model that was to be loaded at the start is not, by the name it was asked for."""
        self.speeds = SpeedStore(settings.speeds_file)
        """How fast the runners were with the models."""
        self._settings = settings
        self._commands = commands
        self._host: Host | None = None
        self._probed = anyio.Event()
        self._probing = anyio.Lock()
        self._next_probe = 0.0
        """When the runners may be asked again."""

    @property
    def catalogue(self) -> Catalogue:
        """The model cards as their files were a second ago, which may be other ones each time."""
        return self._catalogue.known

    @asynccontextmanager
    async def running(self, load: Iterable[str] = ()) -> AsyncGenerator[None]:
        """Probes the host and loads the models ``load`` in the background; ends every process on the way out."""
        settings, commands = self._settings, self._commands
        async with (
            RunnerPool(
                settings.models_directories,
                settings.log_directory,
                commands,
                Deadlines.of_load(settings.limits.load_seconds),
                keep_seconds=settings.limits.keep_seconds,
                on_measured=self._measured,
                residence_seconds=settings.limits.residence_seconds,
                evict_seconds=settings.limits.evict_seconds,
            ) as self.instances,
            Pulls(settings) as self.pulls,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(self._probe)
            tasks.start_soon(self._save_speeds_now_and_then)
            tasks.start_soon(self._follow_cards)
            for model in load:
                tasks.start_soon(self._load, model)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()
                self.speeds.save(self.speeds.unsaved())
                await self.templates.aclose()
                await self.gbnf.aclose()

    def card(self, name: str) -> ModelCard:
        """The card of a model id or alias. Raises ``ServingError``."""
        card = self.catalogue.get(name)
        if card is None:
            raise self._unknown(name)
        return card

    def _unknown(self, name: str) -> ServingError:
        return unknown_model(name, self.catalogue.suggest(name))

    def named(self, model: str) -> str:
        """What a request calls its model; where that is nothing, the only model that is loaded, or known at all.

        Raises ``ServingError``.
        """
        if model:
            return model
        loaded = sorted({each.model_id for each in self.instances.live()})
        found = loaded or list(self.catalogue.cards)
        if len(found) == 1:
            return found[0]
        message = f"model: this field is required; loaded are {', '.join(loaded) or 'none'}"
        raise RequestError(message[:1000], code="missing_parameter", param="model")

    async def describe(self, card: ModelCard) -> Description | None:
        """What the model's files say of it, where they are on disk."""
        store = Store(self._settings.models_directories, self._settings.read_only_directories)
        return await run_sync(describe_on_disk, card, store)

    async def choose(
        self, model: str, needs: Mapping[Need, str] | None = None, arriving: int = 0
    ) -> tuple[ModelCard, Route]:
        """The card and route of what a request calls ``model``; ``needs`` as in ``route``, None: what the card is for.

        ``arriving`` are its sequences, where it has no place in the queue yet. Waits for the host's probe. Raises
        ``ServingError``.
        """
        wish = parse_model(model)
        card = self.card(wish.name)
        if self._host is None:
            await self._probed.wait()
        assert self._host is not None
        needs = card.needs if needs is None else needs
        failing = self.instances.avoided(card)
        prefer, load = card.prefer or self._settings.prefer, self._load_of(card, arriving)
        preference = self.speeds.preference(card, prefer, load, time.time())
        decision = route(wish.runner, card, self._host, self.instances.live_for(card), needs, failing, preference)
        if isinstance(decision, Refusal) and decision.code == "runner_unavailable" and await self._probe_again():
            decision = route(wish.runner, card, self._host, self.instances.live_for(card), needs, failing, preference)
        if isinstance(decision, Refusal):
            raise from_refusal(decision, runner_requested=wish.runner is not None)
        return card, decision

    def sent(self, card: ModelCard, route: Route) -> None:
        """Notes that a request went the way of a decision, for the next one."""
        self.speeds.sent(card.model_id, route.runner, self._load_of(card), route.basis)

    async def ensure_files(self, card: ModelCard, runner: str, on_progress: OnProgress) -> None:
        """Before a runner is started: has its files pulled, or raises ``ServingError``. See ``Pulls.ensure``.

        Runners that are not started by the usual commands find their files themselves.
        """
        if self._commands is None:
            await self.pulls.ensure(card, runner, on_progress)

    async def unload(self, model: str) -> tuple[str, bool]:
        """Unloads a model once its requests have ended, or been cut off after the time that a stop gives them.

        Returns its id, and whether it was loaded or about to be. A model that was loaded by a card that is gone still
        has that card's names. Raises ``ServingError``.
        """
        name = parse_model(model).name
        card = self.catalogue.get(name)
        model_id = self._started_as(name) if card is None else card.model_id
        unloaded = await self.instances.unload(model_id, self._settings.limits.drain_seconds)
        if card is None and not unloaded:
            raise self._unknown(name)
        return model_id, unloaded > 0

    def _started_as(self, name: str) -> str:
        """The id of the only running model whose card had this name when it was started. Raises ``ServingError``."""
        cards = [each.card for each in self.instances.reports()]
        found = {card.model_id for card in cards if name in (card.model_id, *card.aliases)}
        if len(found) != 1:
            raise self._unknown(name)
        return found.pop()

    def is_outdated(self, report: InstanceReport) -> bool:
        """Whether the model card has changed or gone since the instance was started."""
        card = self.catalogue.get(report.now.model_id)
        return card is None or settings_digest(card, report.now.runner) != report.settings

    def _load_of(self, card: ModelCard, arriving: int = 0) -> int:
        """Sequences of a model that are here or about to be."""
        return max(1, self.queues.held(card.model_id) + arriving)

    def _measured(self, card: ModelCard, runner: str, measurement: Measurement) -> None:
        self.speeds.measured(card, runner, measurement, time.time())

    async def _save_speeds_now_and_then(self) -> None:
        while True:
            await anyio.sleep(_SAVE_SECONDS)
            try:
                await run_sync(self.speeds.save, self.speeds.unsaved())
            except Exception:
                log.exception("the measured speeds could not be saved")

    def _slots(self, model_id: str) -> int:
        return sum(runner.slots for runner in self.instances.live() if runner.model_id == model_id)

    async def _probe(self) -> None:
        """Asks the runners what they can do here, and those that do not answer in time again, with more time."""
        async with self._probing:
            host = await self._ask_runners(PROBE_SECONDS)
            if host is None or host.unanswered:  # requests that need such a runner wait for this probe
                host = await self._ask_runners(TRY_SECONDS)
        pause = _PROBE_AGAIN_SECONDS
        while host is None or host.unanswered:
            await anyio.sleep(pause)
            async with self._probing:
                host = await self._ask_runners(TRY_SECONDS)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _ask_runners(self, deadline: float) -> Host | None:
        """Returns None if the system cannot be asked now, as when there are too many open files."""
        commands = self._commands and {name: (*command, "--probe") for name, command in self._commands.items()}
        try:
            found = await probe_host(commands, deadline)
        except Exception:
            log.exception("this machine could not be probed")
            return None
        finally:
            self._next_probe = anyio.current_time() + _PROBE_AGAIN_SECONDS
        if self._host is None:
            for name, probe in found.probes.items():
                for note in probe.notes:
                    log.info("runner %s: %s", name, note)
        self._host = found if self._host is None else updated(self._host, found)
        self._probed.set()
        devices = [each.id for each in self._host.nvidia_devices]
        self.instances.set_capacity(capacity(self._host, self._settings.limits.memory), devices)
        self.speeds.know(self._host)
        if self._host.unanswered:
            names = ", ".join(sorted(self._host.unanswered))
            log.warning("the probe of %s did not answer within %g s and is repeated", names, deadline)
        return self._host

    async def _probe_again(self) -> bool:
        """Asks the runners what they can do by now, unless they were asked a moment ago; whether that was done."""
        before = self._host
        async with self._probing:
            if self._host is before and anyio.current_time() >= self._next_probe:
                await self._ask_runners(PROBE_SECONDS)
        return self._host is not before

    async def _follow_cards(self) -> None:
        """Looks at the files in a thread: the directory may be large, or on a network that is slow."""
        while True:
            try:
                await run_sync(self._catalogue.current, abandon_on_cancel=True)
            except Exception:
                log.exception("the model cards could not be looked at; they stay as they are")
            await anyio.sleep(_CARDS_SECONDS)

    async def _load(self, model: str) -> None:
        """Loads a model before it is asked for, and compiles its template. A failure is logged and shown by /ready."""
        try:
            card, chosen = await self.choose(model)
            await self.ensure_files(card, chosen.runner, _tell_nobody)
            process = self.instances.acquire(chosen, card)
            with self.instances.using(process):
                capabilities = await process.ready()
            if capabilities.chat_template is not None:
                await self.templates.prepare(capabilities.chat_template)
        except (ServingError, RunnerError, TemplateError) as error:
            log.error("%s: %s", model, error)
            self.start_failures[model] = str(error)
        except Exception as error:
            log.exception("%s could not be loaded", model)
            self.start_failures[model] = f"internal error: {error!r}"


async def _tell_nobody(_: DownloadProgress) -> None:
    """For a pull that no request waits for."""
