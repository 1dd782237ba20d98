"""Pulling: asks the hub which files a runner needs, and fetches those, verified, into the store."""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import anyio
import anyio.to_thread

from exo.cards.card import ModelCard
from exo.store.backoff import Stopped
from exo.store.digest import hash_file
from exo.store.download import Download
from exo.store.errors import PullError
from exo.store.file_selection import Source, file_sets, select
from exo.store.folder import Entry, Manifest, ModelFolder, check_name, size_of, store_error
from exo.store.http_stream import Client
from exo.store.hub import Hub, RemoteFile
from exo.store.progress import Meter, Progress
from exo.store.store import OnDisk, Store

_SHOWN_EVERY_SECONDS = 0.1
_LOCK_EVERY_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pull will bring: files at one commit, as many as the runner needs and no more."""

    source: Source
    quant: str
    """The quantisation of a GGUF file; of a folder, empty."""
    revision: str
    files: tuple[RemoteFile, ...]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


async def plan(card: ModelCard, runner: str, hub: Hub, quant: str | None = None) -> Plan:
    """Asks the hub. Raises PullError, which lists the quantisations where none, or more than one, is meant."""
    return await plan_source(Source.of(card, runner, quant), hub)


async def plan_source(source: Source, hub: Hub) -> Plan:
    """As ``plan``."""
    stop = threading.Event()
    try:
        return await anyio.to_thread.run_sync(partial(_plan, source, hub, stop), abandon_on_cancel=True)
    finally:
        stop.set()


async def pull(planned: Plan, store: Store, hub: Hub, report: Callable[[Progress], None]) -> OnDisk:
    """Fetches what is not there yet, and says where the model is. Raises PullError.

    Progress is reported some ten times a second. If it is cancelled, or the process is killed, what has come is kept,
    and the next pull goes on from there; a pull of the same model elsewhere waits, and finds the files there.
    """
    meter, stop = Meter(planned.total), threading.Event()
    job = _Pull(planned, store, hub, meter, stop)
    failure: PullError | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(_show, meter, report)
        try:
            # A limiter of its own: a long pull takes no other work's thread.
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


async def _show(meter: Meter, report: Callable[[Progress], None]) -> None:
    while True:
        report(meter.read())
        await anyio.sleep(_SHOWN_EVERY_SECONDS)


def _plan(source: Source, hub: Hub, stop: threading.Event) -> Plan:
    listing = hub.listing(source.required_repo(), stop=stop)
    chosen = select(source, listing.files)
    files: list[RemoteFile] = []
    for name in chosen.names:
        check_name(name)
        file = listing.files[name]
        if file is None:
            raise PullError("unreachable", f"the hub gives no size and hash of {name}, so it could not be verified")
        files.append(file)
    return Plan(source, chosen.label, listing.revision, tuple(files))


class _Pull:
    """One pull, in a thread from beginning to end."""

    def __init__(self, planned: Plan, store: Store, hub: Hub, meter: Meter, stop: threading.Event) -> None:
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
        """Shows the progress of the pull that has the folder, until the next look at it."""
        with suppress(PullError):
            manifest = folder.manifest()
            held = sum(file.size for file in self._plan.files if folder.holds(manifest, file))
            self._meter.step, self._meter.note = "waiting", "another process is pulling it"
            self._meter.before = held + sum(folder.part_size(file.name, file) for file in self._plan.files)
        if self._stop.wait(_LOCK_EVERY_SECONDS):
            raise Stopped

    def _fill(self, folder: ModelFolder) -> None:
        """Stages every file that is not there, and names them all when the last is whole."""
        manifest = folder.manifest()
        if manifest.repo != self._repo:
            raise PullError("store", f"{folder.path} holds {manifest.repo}, not {self._repo}; move one of them away")
        lacking = [file for file in self._plan.files if not folder.holds(manifest, file)]
        self._meter.note, self._meter.before = "", self._plan.total - sum(file.size for file in lacking)
        hashes = {file.name: sha256 for file in lacking if (sha256 := self._adopt(folder, manifest, file))}
        staged = [file for file in lacking if file.name not in hashes]
        manifest = self._begin(folder, manifest, staged)
        hashes |= self._fetch(folder, staged)
        self._commit(folder, manifest, staged, hashes)

    def _adopt(self, folder: ModelFolder, manifest: Manifest, file: RemoteFile) -> str | None:
        """The SHA-256 of a file that is there, but not recorded, and is what the hub has."""
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
        """Records what is on its way. Parts of what is no longer wanted go."""
        pending = dict(manifest.pending)
        for file in staged:
            if (old := pending.get(file.name)) is not None and old.etag != file.etag:
                folder.part(file.name, old.etag).unlink(missing_ok=True)
            pending[file.name] = Entry(size=file.size, etag=file.etag, revision=self._plan.revision)
        manifest = manifest.model_copy(update={"pending": pending})
        folder.write(manifest)
        return manifest

    def _fetch(self, folder: ModelFolder, staged: Iterable[RemoteFile]) -> dict[str, str]:
        """SHA-256 by name, when all parts are whole."""
        hashes: dict[str, str] = {}
        client = Client()
        for file in staged:
            self._meter.start(file.name, file.size)
            download = Download(
                client,
                self._hub.url(self._repo, self._plan.revision, file.name),
                self._hub.headers(),
                file,
                folder.part(file.name, file.etag),
                meter=self._meter,
                stop=self._stop,
                backoff=self._hub.backoff(self._stop),
            )
            hashes[file.name] = download.run()
            self._meter.finish()
        return hashes

    def _commit(
        self, folder: ModelFolder, manifest: Manifest, staged: Iterable[RemoteFile], hashes: Mapping[str, str]
    ) -> None:
        """Names the parts. Between the two manifests the model counts as partial: it may be of two revisions."""
        names = {file.name for file in staged}
        kept = {name: entry for name, entry in manifest.files.items() if name not in names}
        folder.write(manifest.model_copy(update={"files": kept}))
        for file in staged:
            folder.put(file.name, file.etag)
        wanted = {file.name: file for file in self._plan.files}
        if self._plan.source.runner != "cuda":  # else what an older revision has left would be loaded too
            old = {name for files in file_sets(self._plan.source, kept) for name in files.names}
            folder.delete(old - wanted.keys())
            kept = {name: entry for name, entry in kept.items() if name not in old - wanted.keys()}
        now = datetime.now(UTC)
        for name, file in wanted.items():
            entry = kept.get(name) or Entry(
                size=file.size, etag=file.etag, sha256=hashes[name], revision=self._plan.revision, pulled_at=now
            )
            kept[name] = entry.model_copy(update={"revision": self._plan.revision})
        pending = {name: entry for name, entry in manifest.pending.items() if name not in wanted}
        folder.write(Manifest(repo=self._repo, files=kept, pending=pending))
