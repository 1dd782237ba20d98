"""Runners for one request: the first, and another whenever one dies."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import anyio

from exo.cards.card import ModelCard
from exo.serving.app_state import Services
from exo.serving.errors import model_changed
from exo.serving.pull_jobs import pull_note
from exo.store.progress import DownloadProgress
from exo.worker.protocol.messages import (
    Capabilities,
    Delta,
    Embed,
    Embedded,
    Failed,
    Finished,
    PrefillProgress,
    PromptLogprobs,
    Rank,
    Ranked,
    Status,
    Tokenize,
    Tokenized,
)
from exo.worker.protocol.runners import Need
from exo.worker.router import Route, parse_model
from exo.worker.supervisor.replay import DEATHS, LONGEST_WAIT_SECONDS, Replay, ReplayBudget, other_model, spent
from exo.worker.supervisor.runner_process import RunnerError, RunnerProcess

GenerationEvent = PrefillProgress | PromptLogprobs | Delta | Finished

_RETRY_SECONDS = 1.0
"""After which a client may try again what has failed here."""


@dataclass(frozen=True, slots=True)
class LoadedRunner:
    """A runner that has loaded its model."""

    name: str
    card: ModelCard
    process: RunnerProcess
    capabilities: Capabilities


class Attempts:
    """The runners of one request. ``on_route`` is told each decision, ``on_loading`` in words how far a load is.

    A context: none of the request's runners is unloaded while it lasts.
    """

    def __init__(
        self,
        services: Services,
        model: str,
        needs: Mapping[Need, str] | None,
        on_route: Callable[[Route], None],
        on_loading: Callable[[str], Awaitable[None]],
        keep_seconds: float | None = None,
    ) -> None:
        """``needs``: as ``Services.choose`` takes them.

        ``keep_seconds``: how long the model then stays loaded without being used; None changes nothing.
        """
        self._services = services
        self._model = model
        self._needs = needs
        self._on_route = on_route
        self._on_loading = on_loading
        self._keep_seconds = keep_seconds
        self._used = ExitStack()
        self._first: LoadedRunner | None = None
        """The runner that has made the prompt; all others must have the same model."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._used.close()

    async def runner(self, budget: ReplayBudget) -> LoadedRunner:
        """A runner for the model, after waiting for it to load. One that dies meanwhile is replaced.

        A request that has had a runner waits where none may be started yet; a new one does not. Once it has had one,
        its model is not looked up by its alias again, and a replay on another model is refused. Raises ``RunnerError``
        and ``ServingError``.
        """
        unable: set[str] = set()
        while True:
            self._check_card()
            card, route = await self._services.choose(self._model, self._needs)
            self._on_route(route)
            process: RunnerProcess | None = None
            try:
                if route.instance is None:
                    await self._services.ensure_files(card, route.runner, self._pulling)
                process = self._services.instances.acquire(route, card)
                self._used.enter_context(self._services.instances.using(process))
                self._services.sent(card, route)
                if self._keep_seconds is not None:
                    self._services.instances.keep_alive(card.model_id, self._keep_seconds)
                if process.capabilities is None:
                    async for status in process.loading():
                        await self._on_loading(_in_words(status))
                return self._same_model(LoadedRunner(route.runner, card, process, await process.ready()))
            except RunnerError as error:
                if process is not None and process.displaced:
                    continue
                if error.retry_seconds is not None:
                    if budget.untouched or error.retry_seconds > LONGEST_WAIT_SECONDS:
                        raise
                    await anyio.sleep(error.retry_seconds)
                elif error.failed.code != "runner_died":
                    # It would fail alike again; another engine, if one may serve this, may not.
                    unable.add(route.runner)
                    _, other = await self._services.choose(self._model, self._needs)
                    if other.runner in unable:
                        raise
                elif not budget.allows_replay(route.runner, produced_output=False):
                    raise RunnerError(spent(error.failed), _RETRY_SECONDS) from None

    def _check_card(self) -> None:
        """Raises ``ServingError`` where the card is not the one any more that the request began with."""
        if self._first is None:
            return
        first = self._first.card
        now = self._services.catalogue.get(first.model_id)
        if now is None or now.engines != first.engines:
            raise model_changed(first.model_id, f"its model card {'is gone' if now is None else 'has changed'}")

    def _same_model(self, runner: LoadedRunner) -> LoadedRunner:
        """Raises ``ServingError`` for a runner whose model is not the one that the request began with."""
        if self._first is None:
            self._first = runner
            wish = parse_model(self._model).runner
            self._model = runner.card.model_id + (f"@{wish}" if wish else "")
        elif (why := other_model(self._first.capabilities, runner.capabilities)) is not None:
            raise model_changed(runner.card.model_id, why)
        return runner

    async def _pulling(self, progress: DownloadProgress) -> None:
        await self._on_loading(pull_note(progress))

    async def generate(
        self,
        runner: LoadedRunner,
        replay: Replay,
        on_event: Callable[[GenerationEvent], None],
        flush: Callable[[], Awaitable[None]],
    ) -> None:
        """Generates one sequence to its end, on as many runners as it takes. Raises as ``runner`` does.

        ``flush`` is called after ``on_event`` when no further event is here yet.
        """
        while (failed := await _generate(runner.process, replay, on_event, flush)) is not None:
            if not _may_be_replayed(failed, runner.process):
                raise RunnerError(failed)
            self._check_budget(replay.budget, runner, failed)
            runner = await self.runner(replay.budget)

    async def ask(self, runner: LoadedRunner, command: Embed | Rank | Tokenize) -> Embedded | Ranked | Tokenized:
        """The one answer to ``command``, from as many runners as it takes. Raises as ``runner`` does."""
        budget = ReplayBudget()
        while True:
            try:
                return await runner.process.ask(command)
            except RunnerError as error:
                if not _may_be_replayed(error.failed, runner.process):
                    raise
                self._check_budget(budget, runner, error.failed)
            runner = await self.runner(budget)

    def _check_budget(self, budget: ReplayBudget, runner: LoadedRunner, failed: Failed) -> None:
        """Raises ``RunnerError`` for a request under which runners have died too often."""
        process = runner.process
        if not process.displaced and not budget.allows_replay(
            runner.name, produced_output=process.produced_output.is_set()
        ):
            raise RunnerError(spent(failed), _RETRY_SECONDS) from None


def _may_be_replayed(failed: Failed, process: RunnerProcess) -> bool:
    """Whether a request has failed for no reason of its own."""
    return failed.code in DEATHS and process.died_of(failed) and not process.blames(failed.id)


def _in_words(status: Status) -> str:
    layers = f" {status.layers_loaded}/{status.total_layers}" if status.total_layers else ""
    return f"{status.state.lower()}{layers}"


async def _generate(
    process: RunnerProcess,
    replay: Replay,
    on_event: Callable[[GenerationEvent], None],
    flush: Callable[[], Awaitable[None]],
) -> Failed | None:
    """One attempt."""
    async with process.generate(replay.remainder()) as events:
        async for event in events:
            match event:
                case Delta():
                    replay.take(event)
                case PromptLogprobs():
                    event = replay.untold(event)
                    if not event.items:
                        continue
                case Failed():
                    return event
                case Finished(reason="cancelled"):
                    return Failed(id=event.id, code="shutdown", message="the runner cancelled the request")
                case _:
                    pass
            on_event(event)
            if not events.pending:
                await flush()
    return None
