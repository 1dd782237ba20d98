"""Describes a model on disk before a runner has loaded it."""

from functools import lru_cache
from pathlib import Path

from exo.cards.card import ModelCard
from exo.store.discover.description import Description, DescriptionError, from_config, from_gguf
from exo.store.discover.gguf_header import GgufHeader, HeaderError, read_header
from exo.store.discover.inspection import HEADER_LIMIT
from exo.store.errors import PullError
from exo.store.file_selection import Source
from exo.store.store import Store
from exo.worker.protocol.runners import RUNNERS

_BLOCK = 1 << 20
_JSON_LIMIT = 32 << 20


def describe_on_disk(card: ModelCard, store: Store) -> Description | None:
    """A description from the first runner's files that are on disk and readable; None if there are none.

    Reads up to several megabytes, but only once unless the file changes.
    """
    for runner, spec in RUNNERS.items():
        if not set(spec.backends) & set(card.backends):
            continue
        try:
            found = store.on_disk(Source.of(card, runner))
            if found.state != "present" or found.path is None:
                continue
            name = found.path / "config.json" if found.path.is_dir() else found.path
            state = name.stat()
            return _described(found.path, state.st_mtime_ns, state.st_size)
        except (PullError, HeaderError, DescriptionError, OSError):
            continue  # the runner reports the error when it loads the model
    return None


@lru_cache(maxsize=256)
def _described(path: Path, _modified: int, _size: int) -> Description:
    if not path.is_dir():
        return from_gguf(_header(path))
    template = _content(path / "chat_template.jinja")
    text = template.decode(errors="replace") if template is not None else None
    config = _content(path / "config.json") or b""
    return from_config(config, _content(path / "tokenizer_config.json"), text)


def _header(path: Path) -> GgufHeader:
    with path.open("rb") as file:
        start = bytearray()

        def upto(end: int) -> bytearray:
            if end > HEADER_LIMIT:
                raise HeaderError(f"has more than {HEADER_LIMIT:,} bytes of metadata")
            start.extend(file.read(max(end - len(start), _BLOCK)))
            if len(start) < end:
                raise HeaderError("ends within its metadata")
            return start

        return read_header(upto)


def _content(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            content = file.read(_JSON_LIMIT + 1)
    except FileNotFoundError:
        return None
    if len(content) > _JSON_LIMIT:
        raise DescriptionError(f"has more than {_JSON_LIMIT:,} bytes")
    return content
