"""Downloads of models: requests that need the same files share one."""

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
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
from exo.store.discover.description import Description
from exo.store.errors import PullError, PullErrorCode
from exo.store.file_selection import Source
from exo.store.local import describe_on_disk, is_on_disk
from exo.store.progress import DownloadProgress
from exo.store.store import OnDisk, Store

if TYPE_CHECKING:  # the hub's library takes a tenth of a second to import, so only a download does it
    from exo.store.hub import Hub
    from exo.store.pull import PullPlan

_PROGRESS_SECONDS = 0.5
_REQUEST_CODES: tuple[PullErrorCode, ...] = ("no_match", "not_pullable")


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model on disk, and the plan of its download."""

    plan: "PullPlan"
    found: OnDisk


@final
class Pulls:
    """An asynchronous context. Leaving it ends every download.

    A download continues while a request waits for it. When the last one leaves, it stops and keeps its partial files;
    the next request continues from there.
    """

    def __init__(self, settings: Settings, *, provides_files: bool = True) -> None:
        """If ``provides_files`` is false, ``ensure`` does nothing."""
        self._settings = settings
        self._provides_files = provides_files
        self._jobs: dict[Source, _Job] = {}  # those that may be joined
        self._tasks: TaskGroup  # exists once the context is entered

    async def __aenter__(self) -> Self:
        self._tasks = await anyio.create_task_group().__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._tasks.cancel_scope.cancel()
        return await self._tasks.__aexit__(kind, error, trace)

    async def ensure(
        self, card: ModelCard, runner: str, *, allowed: bool | None = None
    ) -> AsyncGenerator[DownloadProgress]:
        """Downloads the files of a runner that are missing. ``allowed`` overrides the setting for that.

        If the card names no repository, or a file outside of it, nothing is downloaded and the runner explains the
        error. Raises ``ServingError``, also if files are missing and the settings do not allow downloads.
        """
        if not self._provides_files:
            return
        try:
            sources = Source.whole(card, runner)
        except PullError:
            return  # the runner explains the error in its table
        for source in sources:
            if source.repo is None or ".." in PurePosixPath(source.file or "").parts:
                continue
            found = await run_sync(self._on_disk, source)
            if found.state == "present":
                continue
            if not (self._settings.auto_pull if allowed is None else allowed):
                raise _not_downloaded(card, source, found)
            try:
                async with aclosing(self._join(source)) as steps:
                    async for step in steps:
                        if isinstance(step, DownloadProgress):
                            yield step
            except PullError as error:
                raise from_pull_error(error, param="model") from error

    async def pull(self, card: ModelCard, runner: str, quant: str | None) -> AsyncGenerator[DownloadProgress | Pulled]:
        """Downloads these files, then those of the draft model and the adapters. Ends with ``Pulled``.

        Raises ``PullError``, and ``ServingError`` if the server stops.
        """
        first, *beside = Source.whole(card, runner, quant)
        pulled: Pulled | None = None
        for source in (first, *(each for each in beside if each.repo is not None)):
            async with aclosing(self._join(source)) as steps:
                async for step in steps:
                    if isinstance(step, DownloadProgress):
                        yield step
                    else:
                        pulled = pulled or step
        assert pulled is not None
        yield pulled

    async def describe_all(self, cards: Sequence[ModelCard]) -> list[tuple[bool, Description | None]]:
        """Whether each model is on disk, and its description from its files, if they have one."""

        def look() -> list[tuple[bool, Description | None]]:
            store = self._store()
            there = [not self._provides_files or is_on_disk(card, store) for card in cards]
            return [(here, describe_on_disk(card, store)) for card, here in zip(cards, there, strict=True)]

        return await run_sync(look)

    async def _join(self, source: Source) -> AsyncGenerator[DownloadProgress | Pulled]:
        """Starts the download or joins it."""
        source.required_repo()
        job = self._jobs.get(source)
        if job is None:
            job = self._jobs[source] = _Job()
            self._tasks.start_soon(self._run, job, source)
        job.waiting += 1
        try:
            async with aclosing(job.follow()) as steps:
                async for step in steps:
                    yield step
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
        except Exception as error:  # noqa: BLE001 - raised by ``follow``
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

    def _store(self) -> Store:
        return Store(self._settings.models_directories, self._settings.read_only_directories)

    def _on_disk(self, source: Source) -> OnDisk:
        return self._store().on_disk(source)


@dataclass(slots=True)
class _Job:
    """One download. ``Pulls._run`` writes its state, ``Pulls._join`` the number of requests that wait for it."""

    progress: DownloadProgress | None = None
    pulled: Pulled | None = None
    failure: Exception | None = None
    waiting: int = 0
    ended: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    async def follow(self) -> AsyncGenerator[DownloadProgress | Pulled]:
        """The progress, a few times a second, and the result. A slow reader misses progress in between."""
        seen: DownloadProgress | None = None
        while not self.ended.is_set():
            with anyio.move_on_after(_PROGRESS_SECONDS):
                await self.ended.wait()
            if self.progress is not None and self.progress is not seen:
                seen = self.progress
                yield seen
        if isinstance(self.failure, PullError):
            raise PullError(self.failure.code, str(self.failure))  # each waiting request needs an exception of its own
        if self.failure is not None:
            raise self.failure
        if self.pulled is None:
            raise shutting_down()
        yield self.pulled


def from_pull_error(error: PullError, *, param: str) -> ServingError:
    """A pull's failure. ``param`` is the field of the request that selects the files."""
    if error.code in _REQUEST_CODES:
        return RequestError(str(error), code=error.code, param=param)
    return ServingError(str(error), code=error.code)


def pull_note(progress: DownloadProgress) -> str:
    """The progress in words, such as "pulling 41% 12 MB/s"."""
    percent = math.floor(100 * progress.done / progress.total) if progress.total else 100
    rate = f" {progress.rate / 1e6:.0f} MB/s" if progress.step == "downloading" else f", {progress.step}"
    note = f"; {progress.note}" if progress.note else ""
    return f"pulling {percent}%{rate}{note}"


def _not_downloaded(card: ModelCard, source: Source, found: OnDisk) -> ServingError:
    part = f" ({found.bytes:,} of {found.total:,} bytes are)" if found.total else ""
    what = card.model_id
    if source.adapter or source.model_id != card.model_id:
        what = (
            f"{source.model_id}, {card.model_id}'s {f'adapter {source.adapter}' if source.adapter else 'draft model'},"
        )
    message = (
        f"{what} is not on disk for runner {source.runner}{part}; "
        f"`exo pull {card.model_id} --runner {source.runner}` fetches it, and `exo serve --auto-pull` does so unasked"
    )
    return ServingError(message, code="model_not_downloaded", param="model")
