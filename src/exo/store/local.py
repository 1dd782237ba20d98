"""Describes a model on disk before a runner has loaded it."""

from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from exo.cards.card import ModelCard
from exo.store.discover.description import HEADER_LIMIT, Description, DescriptionError, from_folder, from_gguf
from exo.store.errors import PullError
from exo.store.file_selection import Source
from exo.store.store import Store
from exo.worker.protocol.runners import RUNNERS
from exo.worker.runner_common.model_files.gguf import read_gguf
from exo.worker.runner_common.model_files.header_source import HeaderError, LocalHeader

_JSON_LIMIT = 32 << 20


def describe_on_disk(card: ModelCard, store: Store) -> Description | None:
    """A description from the first runner's files that are on disk and readable; None if there are none.

    Reads up to several megabytes, but only once unless the file changes.
    """
    for found in _present(card, store):
        try:
            name = found / "config.json" if found.is_dir() else found
            state = name.stat()
            return _described(found, state.st_mtime_ns, state.st_size)
        except (HeaderError, DescriptionError, OSError):
            continue  # the runner reports the error when it loads the model
    return None


def is_on_disk(card: ModelCard, store: Store, runner: str | None = None) -> bool:
    """Whether the runner's files are on disk; without ``runner``, whether any runner's are."""
    return any(True for _ in _present(card, store, runner))


def _present(card: ModelCard, store: Store, only: str | None = None) -> Iterator[Path]:
    """What each runner that may serve the model would load, if that is on disk."""
    for runner, spec in RUNNERS.items():
        if only in (None, runner) and set(spec.backends) & set(card.backends):
            with suppress(PullError, OSError):  # the runner reports the error when it loads the model
                found = store.on_disk(Source.of(card, runner))
                if found.state == "present" and found.path is not None:
                    yield found.path


@lru_cache(maxsize=256)
def _described(path: Path, _modified: int, _size: int) -> Description:
    if path.is_dir():
        return describe_folder(path)
    return from_gguf(read_gguf(LocalHeader(path), limit=HEADER_LIMIT, tensors=False))


def describe_folder(path: Path, *, embeds: bool = False) -> Description:
    """A folder of safetensors; ``embeds`` marks a text embedding model. Raises DescriptionError and OSError."""
    return from_folder(lambda name: _content(path / name), embeds=embeds)


def _content(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            content = file.read(_JSON_LIMIT + 1)
    except FileNotFoundError:
        return None
    if len(content) > _JSON_LIMIT:
        raise DescriptionError(f"has more than {_JSON_LIMIT:,} bytes")
    return content
