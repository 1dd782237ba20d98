"""Pulling: asks the hub which files a runner needs, and downloads those into the store."""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import anyio
import anyio.to_thread

from exo.store.discover.remote_bytes import indexed
from exo.store.download import Download, hash_file
from exo.store.errors import PullError
from exo.store.file_selection import Source, folder_files, select
from exo.store.folder import Manifest, ModelFolder, PulledFile, RemoteFile, check_name, size_of, store_error
from exo.store.hub import Hub, Stopped
from exo.store.progress import DownloadProgress, Meter
from exo.store.store import OnDisk, Store

_SHOWN_EVERY_SECONDS = 0.1
_LOCK_EVERY_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class PullPlan:
    """The files that a runner needs, at one commit."""

    source: Source
    quant: str
    """The quantisation of a GGUF file; empty for a folder."""
    revision: str
    files: tuple[RemoteFile, ...]

    @property
    def total(self) -> int:
        """The size of all files in bytes."""
        return sum(file.size for file in self.files)


async def plan(source: Source, hub: Hub) -> PullPlan:
    """Asks the hub for the files. Raises PullError; it lists the quantisations if not exactly one fits."""
    stop = threading.Event()
    try:
        return await anyio.to_thread.run_sync(partial(_plan, source, hub, stop), abandon_on_cancel=True)
    finally:
        stop.set()


async def pull(planned: PullPlan, store: Store, hub: Hub, report: Callable[[DownloadProgress], None]) -> OnDisk:
    """Downloads the missing files and returns the place of the model. Raises PullError.

    Progress is reported about ten times a second. A pull that is cancelled or killed keeps its parts, and the next one
    continues them. A pull of the same model in another process waits for this one and then finds the files.
    """
    meter, stop = Meter(planned.total), threading.Event()
    job = _Pull(planned, store, hub, meter, stop)
    failure: PullError | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(_show, meter, report)
        try:
            # A limiter of its own, so that a long pull takes no thread of the default limiter.
            await anyio.to_thread.run_sync(job.run, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
        except PullError as error:
            failure = error
        finally:
            stop.set()
            group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    report(meter.read())
    return store.on_disk(planned.source)


async def _show(meter: Meter, report: Callable[[DownloadProgress], None]) -> None:
    while True:
        report(meter.read())
        await anyio.sleep(_SHOWN_EVERY_SECONDS)


def _plan(source: Source, hub: Hub, stop: threading.Event) -> PullPlan:
    listing = hub.listing(source.required_repo(), stop=stop)
    chosen = select(source, listing.files, indexed(listing, hub) if source.runner != "cuda" else None)
    files: list[RemoteFile] = []
    for name in chosen.names:
        check_name(name)
        file = listing.files[name]
        if file is None:
            raise PullError("unreachable", f"the hub gives no size and hash of {name}, so it could not be verified")
        files.append(file)
    return PullPlan(source, chosen.label, listing.revision, tuple(files))


class _Pull:
    """One pull. It runs in one thread from beginning to end."""

    def __init__(self, planned: PullPlan, store: Store, hub: Hub, meter: Meter, stop: threading.Event) -> None:
        self._plan = planned
        self._repo = planned.source.required_repo()
        self._store = store
        self._hub = hub
        self._meter = meter
        self._stop = stop

    def run(self) -> None:
        """Raises PullError and Stopped."""
        while self._store.holder(self._repo, self._plan.files) is None:
            self._hub.require_online(self._repo)
            folder = self._store.place(self._repo, self._plan.files)
            try:
                with folder.locked():
                    self._fill(folder)
                break
            except PullError as error:
                if error.code != "busy":
                    raise
                self._watch(folder)
            except OSError as error:
                raise store_error(folder.path, error) from error
        self._meter.before = self._plan.total
        self._meter.start("", 0)

    def _watch(self, folder: ModelFolder) -> None:
        """Shows the progress of the process that has locked the folder, until the next attempt to lock it."""
        with suppress(PullError):
            manifest = folder.manifest()
            held = sum(file.size for file in self._plan.files if folder.holds(manifest, file))
            self._meter.step, self._meter.note = "waiting", "another process is pulling it"
            self._meter.before = held + sum(folder.part_size(file.name, file) for file in self._plan.files)
        if self._stop.wait(_LOCK_EVERY_SECONDS):
            raise Stopped

    def _fill(self, folder: ModelFolder) -> None:
        """Completes the parts of all missing files before it names the first, so that the old revision stays usable."""
        manifest = folder.manifest()
        if manifest.repo != self._repo:
            raise PullError("store", f"{folder.path} holds {manifest.repo}, not {self._repo}; move one of them away")
        missing = [file for file in self._plan.files if not folder.holds(manifest, file)]
        self._meter.note, self._meter.before = "", self._plan.total - sum(file.size for file in missing)
        hashes = {file.name: sha256 for file in missing if (sha256 := self._adopt(folder, manifest, file))}
        staged = [file for file in missing if file.name not in hashes]
        manifest = self._begin(folder, manifest, staged)
        for file in staged:
            self._meter.start(file.name, file.size)
            hashes[file.name] = Download(self._hub, folder, self._plan.revision, file, self._meter, self._stop).run()
            self._meter.finish()
        self._commit(folder, manifest, staged, hashes)

    def _adopt(self, folder: ModelFolder, manifest: Manifest, file: RemoteFile) -> str | None:
        """The SHA-256 of a file that is on disk but not in the manifest; None if its content is not the hub's."""
        check_name(file.name)
        path = folder.path / file.name
        size = size_of(path)
        if size is None or file.name in manifest.files:
            return None
        if size == file.size:
            self._meter.step = "checking"
            self._meter.start(file.name, file.size)
            sha256, found = hash_file(path, file, self._meter, self._stop)
            if found == file.etag:
                self._meter.finish()
                return sha256
            self._meter.start("", 0)
        if file.name not in manifest.pending:
            raise PullError("store", f"{path} was not pulled by exo, and is not what the hub has; move it away")
        return None

    def _begin(self, folder: ModelFolder, manifest: Manifest, staged: Iterable[RemoteFile]) -> Manifest:
        """Records the files to pull, and deletes the parts of their older contents."""
        pending = dict(manifest.pending)
        for file in staged:
            if (old := pending.get(file.name)) is not None and old.etag != file.etag:
                folder.part(file.name, old.etag).unlink(missing_ok=True)
            pending[file.name] = PulledFile(size=file.size, etag=file.etag, revision=self._plan.revision)
        manifest = manifest.model_copy(update={"pending": pending})
        folder.write(manifest)
        return manifest

    def _commit(
        self, folder: ModelFolder, manifest: Manifest, staged: Iterable[RemoteFile], hashes: Mapping[str, str]
    ) -> None:
        """Names the parts. Between the two manifests the model counts as partial, because it may mix two revisions."""
        names = {file.name for file in staged}
        kept = {name: entry for name, entry in manifest.files.items() if name not in names}
        folder.write(manifest.model_copy(update={"files": kept}))
        for file in staged:
            folder.put(file.name, file.etag)
        wanted = {file.name: file for file in self._plan.files}
        if self._plan.source.runner != "cuda":  # files of an older revision would be loaded too
            old = set(folder_files(kept))
            folder.delete(old - wanted.keys())
            kept = {name: entry for name, entry in kept.items() if name not in old - wanted.keys()}
        now = datetime.now(UTC)
        for name, file in wanted.items():
            entry = kept.get(name) or PulledFile(
                size=file.size, etag=file.etag, sha256=hashes[name], revision=self._plan.revision, pulled_at=now
            )
            kept[name] = entry.model_copy(update={"revision": self._plan.revision})
        pending = {name: entry for name, entry in manifest.pending.items() if name not in wanted}
        folder.write(Manifest(repo=self._repo, files=kept, pending=pending))
