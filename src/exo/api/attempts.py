"""Runners for one request: the first, and another whenever one dies."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio

from exo.api.services import Services
from exo.models.card import ModelCard
from exo.worker.messages import Capabilities, Delta, Failed, Finished, PrefillProgress, Status
from exo.worker.process import RunnerError, RunnerProcess
from exo.worker.replay import DEATHS, LONGEST_WAIT_SECONDS, Budget, Replay, spent
from exo.worker.router import Route

_RETRY_SECONDS = 1.0
"""After which a client may try again what has failed here."""


@dataclass(frozen=True, slots=True)
class Runner:
    """A runner that has loaded its model."""

    name: str
    card: ModelCard
    process: RunnerProcess
    capabilities: Capabilities


class Attempts:
    """The runners of one request. ``on_route`` is told each decision, ``on_loading`` how far a load is."""

    def __init__(
        self,
        services: Services,
        model: str,
        on_route: Callable[[Route], None],
        on_loading: Callable[[Status], Awaitable[None]],
    ) -> None:
        self._services = services
        self._model = model
        self._on_route = on_route
        self._on_loading = on_loading

    async def runner(self, budget: Budget) -> Runner:
        """A runner for the model, after waiting for it to load. One that dies meanwhile is replaced.

        A request that has had a runner waits where none may be started yet; a new one does not. Raises ``RunnerError``
        and ``ApiError``.
        """
        while True:
            card, route = await self._services.choose(self._model)
            self._on_route(route)
            try:
                process = self._services.instances.acquire(route, card)
                if process.capabilities is None:
                    async for status in process.loading():
                        await self._on_loading(status)
                return Runner(route.runner, card, process, await process.ready())
            except RunnerError as error:
                if error.retry_seconds is not None:
                    if budget.untouched or error.retry_seconds > LONGEST_WAIT_SECONDS:
                        raise
                    await anyio.sleep(error.retry_seconds)
                elif error.failed.code != "runner_died":
                    raise
                elif not budget.allows_replay(route.runner, proven=False):
                    raise RunnerError(spent(error.failed), _RETRY_SECONDS) from None

    async def generate(
        self, runner: Runner, replay: Replay, on_event: Callable[[PrefillProgress | Delta | Finished], Awaitable[None]]
    ) -> None:
        """Generates one sequence to its end, on as many runners as it takes. Raises as ``runner`` does."""
        while (failed := await _generate(runner.process, replay, on_event)) is not None:
            if failed.code not in DEATHS or not runner.process.died_of(failed):
                raise RunnerError(failed)
            if not replay.budget.allows_replay(runner.name, proven=runner.process.proven.is_set()):
                raise RunnerError(spent(failed), _RETRY_SECONDS)
            runner = await self.runner(replay.budget)


async def _generate(
    process: RunnerProcess, replay: Replay, on_event: Callable[[PrefillProgress | Delta | Finished], Awaitable[None]]
) -> Failed | None:
    """One attempt."""
    async with process.generate(replay.remainder()) as events:
        async for event in events:
            match event:
                case Failed():
                    return event
                case Finished(reason="cancelled"):
                    return Failed(id=event.id, code="shutdown", message="the runner cancelled the request")
                case Delta():
                    replay.take(event)
                case _:
                    pass
            await on_event(event)
    return None
