"""Models that this server is pulling: one download for all who wait for it."""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Self, final

import anyio
from anyio.abc import TaskGroup
from anyio.to_thread import run_sync

from exo.cards.card import ModelCard
from exo.config import Settings
from exo.serving.errors import RequestError, ServingError, shutting_down
from exo.store.errors import PullError, PullErrorCode
from exo.store.file_selection import Source
from exo.store.progress import DownloadProgress

if TYPE_CHECKING:  # what imports the hub's library, a tenth of a second, is imported when there is something to pull
    from exo.store.hub import Hub
    from exo.store.pull import PullPlan
    from exo.store.store import OnDisk, Store

OnProgress = Callable[[DownloadProgress], Awaitable[None]]

_TOLD_EVERY_SECONDS = 0.5
_REQUEST_CODES: tuple[PullErrorCode, ...] = ("no_match", "not_pullable")


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model that is there, and what was pulled for it."""

    plan: "PullPlan"
    found: "OnDisk"


@final
class Pulls:
    """An asynchronous context: leaving it ends every pull.

    A pull belongs to those who wait for it. It goes on while there is one of them, and stops when the last has left;
    what has come is kept, and whoever asks next goes on from there.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._jobs: dict[Source, _Job] = {}
        """Pulls that may be joined."""
        self._tasks: TaskGroup = anyio.create_task_group()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._tasks.cancel_scope.cancel()
        return await self._tasks.__aexit__(kind, error, trace)

    async def ensure(self, card: ModelCard, runner: str, on_progress: OnProgress) -> None:
        """Sees to it that the files are here before a runner is started for them.

        Where the card names no repository, or a file outside of it, nothing can be pulled, and the runner itself says
        what is wrong. Raises ``ServingError``: 404 ``model_not_downloaded`` unless the settings allow pulling, and what
        that comes to.
        """
        try:
            sources = Source.of(card, runner), Source.of_draft(card, runner)
        except PullError:
            return  # the runner says what is wrong with its table
        for source in sources:
            if source is None or source.repo is None or ".." in PurePosixPath(source.file or "").parts:
                continue
            found = await run_sync(self._on_disk, source)
            if found.state == "present":
                continue
            if not self._settings.auto_pull:
                raise _not_downloaded(card, source, found)
            try:
                await self._join(source, on_progress)
            except PullError as error:
                raise from_pull_error(error, param="model") from error

    async def pull(self, card: ModelCard, runner: str, quant: str | None, on_progress: OnProgress) -> Pulled:
        """Joins the pull of these files, or begins it, and then of the draft model's, if there is one to pull.

        Raises PullError, and ``ServingError`` where the server stops.
        """
        draft = Source.of_draft(card, runner)
        pulled = await self._join(Source.of(card, runner, quant), on_progress)
        if draft is not None and draft.repo is not None:
            await self._join(draft, on_progress)
        return pulled

    async def _join(self, source: Source, on_progress: OnProgress) -> Pulled:
        source.required_repo()
        job = self._jobs.get(source)
        if job is None:
            job = self._jobs[source] = _Job()
            self._tasks.start_soon(self._run, job, source)
        job.waiting += 1
        try:
            return await job.follow(on_progress)
        finally:
            job.waiting -= 1
            if not job.waiting:
                job.scope.cancel()
                self._forget(source, job)

    async def _run(self, job: "_Job", source: Source) -> None:
        try:
            with job.scope:
                hub, store = await run_sync(self._library)
                from exo.store.pull import plan, pull

                planned = await plan(source, hub)
                job.pulled = Pulled(planned, await pull(planned, store, hub, partial(setattr, job, "progress")))
        except Exception as error:  # noqa: BLE001 - raised to those who wait
            job.failure = error
        finally:
            self._forget(source, job)
            job.ended.set()

    def _forget(self, source: Source, job: "_Job") -> None:
        if self._jobs.get(source) is job:
            del self._jobs[source]

    def _library(self) -> "tuple[Hub, Store]":
        from exo.store.hub import Hub

        return Hub(self._settings.hub), self._store()

    def _store(self) -> "Store":
        from exo.store.store import Store

        return Store(self._settings.models_directories, self._settings.read_only_directories)

    def _on_disk(self, source: Source) -> "OnDisk":
        return self._store().on_disk(source)


@dataclass(slots=True)
class _Job:
    """One pull. ``Pulls._run`` is the only writer of how far it is, ``Pulls.pull`` of who waits."""

    progress: DownloadProgress | None = None
    pulled: Pulled | None = None
    failure: Exception | None = None
    waiting: int = 0
    ended: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    async def follow(self, on_progress: OnProgress) -> Pulled:
        """Tells how far it is, a few times a second, until it ends. However slowly one listens, nothing piles up."""
        told: DownloadProgress | None = None
        while not self.ended.is_set():
            with anyio.move_on_after(_TOLD_EVERY_SECONDS):
                await self.ended.wait()
            if self.progress is not None and self.progress is not told:
                told = self.progress
                await on_progress(told)
        if isinstance(self.failure, PullError):
            raise PullError(self.failure.code, str(self.failure))  # for each who waits an exception of its own
        if self.failure is not None:
            raise self.failure
        if self.pulled is None:
            raise shutting_down()
        return self.pulled


def from_pull_error(error: PullError, *, param: str) -> ServingError:
    """A pull's failure. ``param`` is the field of the request that selects the files."""
    if error.code in _REQUEST_CODES:
        return RequestError(str(error), code=error.code, param=param)
    return ServingError(str(error), code=error.code)


def pull_note(progress: DownloadProgress) -> str:
    """What people may want to read while a request waits for a pull: "pulling 41% 12 MB/s"."""
    percent = math.floor(100 * progress.done / progress.total) if progress.total else 100
    rate = f" {progress.rate / 1e6:.0f} MB/s" if progress.step == "downloading" else f", {progress.step}"
    note = f"; {progress.note}" if progress.note else ""
    return f"pulling {percent}%{rate}{note}"


def _not_downloaded(card: ModelCard, source: Source, found: "OnDisk") -> ServingError:
    part = f" ({found.bytes:,} of {found.total:,} bytes are)" if found.total else ""
    what = card.model_id if source.model_id == card.model_id else f"{source.model_id}, {card.model_id}'s draft model,"
    message = (
        f"{what} is not on disk for runner {source.runner}{part}; "
        f"`exo pull {card.model_id} --runner {source.runner}` fetches it, and `exo serve --auto-pull` does so unasked"
    )
    return ServingError(message, code="model_not_downloaded", param="model")
