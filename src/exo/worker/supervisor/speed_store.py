"""Stores the measured speed of every runner, by model and host, also in a file that outlives the server."""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Annotated, Literal, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exo.cards.card import ModelCard
from exo.store.sharing import make_directory, share
from exo.worker.host import Host
from exo.worker.protocol.runners import Prefer
from exo.worker.speed import NEEDED, Basis, Measurement, Point, Preference, Speed, level

log = logging.getLogger(__name__)

FRESH_SECONDS = 86400.0
"""Older points are ignored, so that a runner that lost once gets another chance."""
_LOCK_SECONDS = 5.0
"""The longest wait for another server that is writing its measurements."""
_LARGEST = 16 << 20
"""A file with more bytes is ignored."""


class StoredSpeed(BaseModel):
    """The points of one model on one runner on one host."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str
    runner: str
    host: str
    """A digest of the processors, the devices, and the runner's engine with its version."""
    table: str
    """A digest of the runner's table in the card. The points are void for another table."""
    points: dict[Annotated[int, Field(ge=1)], Point]

    @property
    def key(self) -> tuple[str, str, str]:
        """The key in the store."""
        return self.model, self.runner, self.host


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    entries: tuple[StoredSpeed, ...] = ()


@final
class SpeedStore:
    """One server's measurements. ``file`` is read now; None stores nothing. Times are in seconds since 1970."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._entries = {} if file is None else _read(file)
        self._measured: set[tuple[str, str, str]] = set()  # the keys of entries to be written
        self._hosts: dict[str, str] = {}  # digests of this host, by runner
        self._sent: Counter[tuple[str, str, int]] = Counter()  # requests by model id, runner and level of load
        self._incumbents: dict[str, str] = {}  # by model id: the runner chosen when measurements decided last
        self._saving = Lock()

    def set_host(self, host: Host) -> None:
        """Sets the host. Before this call no measurement is known, and none may be added."""
        self._hosts = {runner: _host_digest(host, runner) for runner in host.probes}

    def add(self, card: ModelCard, runner: str, measured: Measurement, now: float) -> None:
        """Adds a measurement of a runner that was started with this model card."""
        key, table = (card.model_id, runner, self._hosts[runner]), _table_digest(card, runner)
        entry = self._entries.get(key)
        points = dict(entry.points) if entry is not None and entry.table == table else {}
        at = level(measured.load)
        before = points.get(at)
        if before is None or not _fresh(before, now):
            points[at] = Point.of(measured, now)
        else:
            points[at] = before.take(measured, now)
        self._entries[key] = StoredSpeed(model=card.model_id, runner=runner, host=key[2], table=table, points=points)
        self._measured.add(key)

    def known(self, card: ModelCard, now: float) -> dict[str, Speed]:
        """Returns all fresh points of a model, by runner."""
        return {runner: self._speed(card, runner, now) for runner in self._hosts}

    def preference(self, card: ModelCard, prefer: Prefer | None, load: int, now: float) -> Preference | None:
        """Returns the basis for choosing a runner for a model's next request; None if speed does not count.

        ``load`` is the number of the model's sequences at once, including that request.
        """
        if prefer is None:
            return None
        return Preference(
            prefer=prefer,
            load=load,
            speeds={
                runner: {at: point for at, point in speed.items() if point.count >= NEEDED}
                for runner, speed in self.known(card, now).items()
            },
            sent={runner: self._sent[card.model_id, runner, level(load)] for runner in self._hosts},
            incumbent=self._incumbents.get(card.model_id),
        )

    def count_request(self, model_id: str, runner: str, load: int, basis: Basis) -> None:
        """Counts a request that was sent to a runner for the reason ``basis``."""
        if basis == "figures":
            self._incumbents[model_id] = runner
        if basis != "order":
            self._sent[model_id, runner, level(load)] += 1

    def unsaved(self) -> tuple[StoredSpeed, ...]:
        """Returns the entries that have changed since the last call, for ``save``."""
        entries = tuple(self._entries[key] for key in self._measured)
        self._measured.clear()
        return entries

    def save(self, entries: Sequence[StoredSpeed]) -> None:
        """Merges entries into the file, which other servers may have changed. May be called from any thread.

        A file that cannot be written is not tried again.
        """
        with self._saving:
            if self._file is None or not entries:
                return
            try:
                make_directory(self._file.parent)
                with _alone_in(self._file.parent):
                    all_entries = _read(self._file)
                    for entry in entries:
                        all_entries[entry.key] = _merged(all_entries.get(entry.key), entry)
                    content = _File(entries=tuple(all_entries[key] for key in sorted(all_entries)))
                    _replace(self._file, content.model_dump_json(indent=1))
            except OSError as error:
                log.warning("%s cannot be written; measured speeds end with this server: %s", self._file, error)
                self._file = None

    def _speed(self, card: ModelCard, runner: str, now: float) -> Speed:
        entry = self._entries.get((card.model_id, runner, self._hosts[runner]))
        if entry is None or entry.table != _table_digest(card, runner):
            return {}
        return {at: entry.points[at] for at in sorted(entry.points) if _fresh(entry.points[at], now)}


def _merged(written: StoredSpeed | None, measured: StoredSpeed) -> StoredSpeed:
    """Returns an entry with the later point of each load, whichever server has measured it."""
    if written is None or written.table != measured.table:
        return measured
    points = dict(written.points)
    for load, point in measured.points.items():
        if load not in points or points[load].at <= point.at:
            points[load] = point
    return measured.model_copy(update={"points": points})


def _read(file: Path) -> dict[tuple[str, str, str], StoredSpeed]:
    """Returns the entries of a file, by key. An unusable file counts as empty and is overwritten later."""
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST:,} bytes")
        return {entry.key: entry for entry in _File.model_validate_json(content).entries}
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    except OSError as error:
        why = error.strerror
    except ValueError as error:
        why = str(error)
    log.warning("the measured speeds in %s are ignored: %s", file, why)
    return {}


@contextmanager
def _alone_in(directory: Path) -> Generator[None]:
    """Locks a directory against other servers, or continues without the lock after a few seconds. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _locked(descriptor) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _replace(file: Path, text: str) -> None:
    """Replaces a file's content at once. Raises OSError and leaves the file unchanged then."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        share(unfinished, file.parent)
        unfinished.replace(file)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _fresh(point: Point, now: float) -> bool:
    """Whether a point is recent. A point from the future is not: it would never grow old."""
    return abs(now - point.at) <= FRESH_SECONDS


def _table_digest(card: ModelCard, runner: str) -> str:
    return _digest([json.dumps(card.engines.get(runner, {}), sort_keys=True).encode()])


def _host_digest(host: Host, runner: str) -> str:
    probe = host.probes[runner]
    processors = (host.system, host.machine, host.processor, str(host.cpu_count))
    devices = (each.name for each in host.nvidia_devices)
    engine = (probe.engine, probe.version, *probe.backends)
    return _digest([each.encode() for each in chain(processors, devices, engine)])


def _digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
