"""Runners for one request: the first, and another one whenever one dies."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Self, final

import anyio

from exo.cards.card import ModelCard
from exo.serving.activity import current_record
from exo.serving.affinity import prefix_keys
from exo.serving.errors import ServingError, model_changed, unknown_model
from exo.serving.events import Loading, Routed
from exo.serving.pull_jobs import pull_note
from exo.serving.request import Prompt, RequestedModel
from exo.serving.warnings import warn
from exo.worker.protocol.commands import Embed, Rank, Tokenize
from exo.worker.protocol.events import (
    Capabilities,
    Embedded,
    Failed,
    Ranked,
    Tokenized,
)
from exo.worker.protocol.runners import Need
from exo.worker.router import Route
from exo.worker.supervisor.replay import DEATHS, LONGEST_WAIT_SECONDS, ReplayBudget, other_model, spent
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.runner_process import RunnerProcess

if TYPE_CHECKING:
    from exo.serving.app_state import Services

_HOST_SECONDS = 60.0
_RETRY_SECONDS = 1.0
"""Time after which a client may repeat a request that has failed here."""


@dataclass(frozen=True, slots=True)
class LoadedRunner:
    """A runner that has loaded its model."""

    route: Route
    card: ModelCard
    process: RunnerProcess
    capabilities: Capabilities


@final
class Failover:
    """Finds the runners of one request. A context: none of them is unloaded while it lasts."""

    def __init__(
        self,
        services: "Services",
        model: RequestedModel,
        needs: Mapping[Need, str] | None,
        keep_seconds: float | None = None,
        prompts: Sequence[Prompt] = (),
    ) -> None:
        """``needs`` is passed to ``Routing.choose``.

        ``keep_seconds`` is how long the model then stays loaded without being used; None changes nothing. ``prompts``
        are what the runner will compute.
        """
        self.runner: LoadedRunner  # the last one that ``connect`` has found
        self._services = services
        self._model = model
        self._needs = needs
        self._keep_seconds = keep_seconds
        self._prefixes = prefix_keys(model.card.model_id, prompts) if services.links is not None else ()
        self._record = current_record()
        self._in_use = ExitStack()
        self._first: LoadedRunner | None = None  # it made the prompt, so all others must have the same model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._in_use.close()

    async def acquire(self, budget: ReplayBudget) -> LoadedRunner:
        """Does what ``connect`` does, without telling of the steps, and returns the runner."""
        async with aclosing(self.connect(budget)) as steps:
            async for _ in steps:
                pass
        return self.runner

    async def connect(self, budget: ReplayBudget) -> AsyncGenerator[Routed | Loading]:
        """Sets ``runner``: routes the request and waits for the model to load. A runner that dies is replaced.

        If the runner is paused after repeated failures, a replayed request waits and a new one fails. A replay on
        another model is refused. Raises ``RunnerError`` and ``ServingError``.
        """
        services, pool = self._services, self._services.pool
        unable: set[str] = set()
        failed: list[Failed] = []  # the reasons of these runners
        for attempt in count():
            if attempt or self._first is not None:
                self._look_at_card_again()
            card = self._model.card
            route = await self._choose()
            self._record.routed(route)
            yield Routed(route.runner, route.reason, route.host)
            process: RunnerProcess | None = None
            try:
                if route.instance is None:
                    async with aclosing(services.ensure_files(route, card)) as pull:
                        async for progress in pull:
                            self._record.enter("loading")
                            yield Loading(pull_note(progress))
                process = pool.acquire(route, card)
                self._record.instance = self._in_use.enter_context(pool.using(process))
                services.routing.sent(card, route)
                if services.links is not None:
                    services.affinity.note(self._prefixes, self._record.instance)
                if route.replica is not None:
                    services.load_replica(card, replace(route, host=route.replica, instance=None))
                if self._keep_seconds is not None:
                    pool.keep_alive(card.model_id, self._keep_seconds)
                if process.capabilities is None:
                    self._record.enter("loading")
                    async for status in process.loading():
                        layers = f" {status.layers_loaded}/{status.total_layers}" if status.total_layers else ""
                        yield Loading(f"{status.state.lower()}{layers}")
                self.runner = LoadedRunner(route, card, process, await process.ready())
                self._tell_notes()
            except ServingError:
                # That another engine's files are missing does not explain why this model's own cannot be loaded.
                reasons = [*failed, *pool.history.avoided(card).values()]
                if reasons:
                    raise RunnerError(reasons[0]) from None
                raise
            except RunnerError as error:
                if process is not None and process.displaced:
                    continue
                if error.retry_seconds is not None:
                    if budget.untouched or error.retry_seconds > LONGEST_WAIT_SECONDS:
                        raise
                    await anyio.sleep(error.retry_seconds)
                elif error.failed.code != "runner_died":
                    # This runner would fail in the same way again; another engine may not.
                    unable.add(route.place)
                    failed.append(error.failed)
                    other = await services.routing.choose(self._model, self._needs)
                    if other.place in unable:
                        raise
                elif not budget.allows_replay(route.place, produced_output=False):
                    raise RunnerError(spent(error.failed), _RETRY_SECONDS) from None
            else:
                self._check_model()
                self._record.enter("queued")
                return

    async def _choose(self) -> Route:
        """See ``Routing.choose``. A request in flight waits a while for a lost host if no other can serve."""
        links, deadline = self._services.links, anyio.current_time() + _HOST_SECONDS
        while True:
            try:
                cached_on = None if links is None else self._services.affinity.find(self._prefixes)
                return await self._services.routing.choose(self._model, self._needs, cached_on=cached_on)
            except ServingError as error:
                left = deadline - anyio.current_time()
                if error.code != "runner_unavailable" or self._first is None or links is None or left <= 0:
                    raise
            with anyio.move_on_after(left):
                await links.comes_up()

    def _look_at_card_again(self) -> None:
        """Follows a change of the model card, unless a runner has begun the request. Raises ``ServingError``."""
        catalogue, model_id = self._services.cards.known, self._model.card.model_id
        now = catalogue.get(model_id)
        if self._first is not None:
            if now is None or now.engines != self._first.card.engines:
                raise model_changed(model_id, f"its model card {'is gone' if now is None else 'has changed'}")
        elif now is None:
            raise unknown_model(catalogue.unknown(model_id))
        else:
            self._model = replace(self._model, card=now)

    def _check_model(self) -> None:
        """Raises ``ServingError`` if the runner's model is not the one that the request began with."""
        if self._first is None:
            self._first = self.runner
        elif (why := other_model(self._first.capabilities, self.runner.capabilities)) is not None:
            raise model_changed(self.runner.card.model_id, why)

    def _tell_notes(self) -> None:
        """Warns of how the model was loaded and of its faults in the first reply of each process."""
        process = self.runner.process
        for note in () if process.told_notes else process.notes:
            warn("", note)
        process.told_notes = True

    def check_replay(self, runner: LoadedRunner, failed: Failed, budget: ReplayBudget) -> None:
        """Raises ``RunnerError`` if the request itself caused this failure or runners have died under it too often."""
        process = runner.process
        if failed.code not in DEATHS or not process.died_of(failed) or process.blames(failed.id):
            raise RunnerError(failed) from None
        if not process.displaced and not budget.allows_replay(
            runner.route.place, produced_output=process.produced_output.is_set()
        ):
            raise RunnerError(spent(failed), _RETRY_SECONDS) from None

    async def ask(self, command: Embed | Rank | Tokenize) -> Embedded | Ranked | Tokenized:
        """The answer to ``command``, from as many runners as it takes. Raises ``RunnerError`` and ``ServingError``."""
        budget, runner = ReplayBudget(), self.runner
        while True:
            try:
                return await runner.process.ask(command)
            except RunnerError as error:
                self.check_replay(runner, error.failed, budget)
                self._record.replayed(0)
            runner = await self.acquire(budget)
