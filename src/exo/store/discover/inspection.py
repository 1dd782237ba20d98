"""What a repository on the hub holds for a runner, found out from the beginnings of its files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from pydantic import JsonValue

from exo.store.discover.description import Description, DescriptionError, from_config, from_gguf
from exo.store.discover.gguf_header import HeaderError, read_header
from exo.store.discover.remote_bytes import RemoteBytes
from exo.store.errors import PullError
from exo.store.file_selection import Source, quantisations, select
from exo.store.folder import check_name
from exo.store.hub import Hub, Listing
from exo.worker.protocol.runners import RUNNERS

DEFAULT_QUANT = "Q4_K_M"
HEADER_LIMIT = 64 << 20
"""Bytes of metadata; a vocabulary of 262,144 tokens takes about 10 MB."""
_JSON_LIMIT = 32 << 20
_SENTENCE_TRANSFORMER = "modules.json"
"""A file that only models for vectors have."""
_BACKENDS = ("MlxMetal", "Vllm", "MlxCuda", "MlxCpu")
"""Of a folder that both runners of such load: each where it is at its best."""
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class Found:
    """A model, and the tables of a card for it by runner."""

    tables: Mapping[str, dict[str, JsonValue]]
    """Of each runner that can load the files."""
    backends: tuple[str, ...]
    """Those of these runners, the preferred one first."""
    description: Description
    files: tuple[str, ...]
    """What a pull will fetch."""
    bytes: int
    quantization: str
    notes: tuple[str, ...] = ()
    """What was decided for the user."""


def inspect(listing: Listing, hub: Hub, quant: str | None) -> Found:
    """A GGUF file of this quantisation, or failing any GGUF file a folder's model. Weights are not fetched.

    Raises PullError for what is neither, or broken, and where the quantisation is to be chosen.
    """
    return _gguf(listing, hub, quant) if quantisations(listing.files) else _folder(listing, hub, quant)


def _gguf(listing: Listing, hub: Hub, quant: str | None) -> Found:
    repo, labels = listing.repo, quantisations(listing.files)
    label = quant or (labels[0] if len(labels) == 1 else DEFAULT_QUANT)
    if quant is None and label not in labels:
        raise PullError("no_match", f"{repo} has {', '.join(labels)}; choose one, as in {repo}:{labels[0]}")
    chosen = select(Source(repo, "cuda", repo, quant=label), listing.files)
    first = chosen.names[0]
    start = _start(listing, hub, first)
    description = _made(first, lambda: from_gguf(read_header(lambda end: _upto(start, end))))
    other = next((each for each in labels if each != chosen.label), None)
    several = f"took {chosen.label} of {', '.join(labels)}; for another, say {repo}:{other}"
    notes = (several,) if quant is None and other is not None else ()
    tables: dict[str, dict[str, JsonValue]] = {"cuda": {"repo": repo, "file": first}}
    backends, size = RUNNERS["cuda"].backends, _size(listing, chosen.names)
    return Found(tables, backends, description, chosen.names, size, chosen.label, notes)


def _folder(listing: Listing, hub: Hub, quant: str | None) -> Found:
    if quant is not None:
        raise PullError("no_match", f"{listing.repo} has no GGUF file, so there is no {quant}; leave it out")
    chosen = select(Source(listing.repo, "mlx", listing.repo), listing.files)
    config = _whole(listing, hub, "config.json") or b""
    tokenizer = _whole(listing, hub, "tokenizer_config.json")
    template = _whole(listing, hub, "chat_template.jinja")
    text = template.decode(errors="replace") if template is not None else None
    embeds = _SENTENCE_TRANSFORMER in listing.files
    description = _made("config.json", lambda: from_config(config, tokenizer, text, embeds=embeds))
    size = _size(listing, chosen.names)
    backends = _BACKENDS if description.for_transformers else RUNNERS["mlx"].backends
    runners = [name for name in ("mlx", "vllm") if set(RUNNERS[name].backends) & set(backends)]
    tables: dict[str, dict[str, JsonValue]] = {name: {"repo": listing.repo} for name in runners}
    return Found(tables, backends, description, chosen.names, size, description.quantization)


def _made(name: str, make: Callable[[], _Made]) -> _Made:
    try:
        return make()
    except (HeaderError, DescriptionError) as error:
        raise PullError("wrong_content", f"{name} {error}") from error


def _start(listing: Listing, hub: Hub, name: str) -> RemoteBytes:
    check_name(name)
    file = listing.files[name]
    if file is None:
        raise PullError("unreachable", f"the hub gives no size of {name}")
    return RemoteBytes(hub, listing.repo, listing.revision, file)


def _upto(start: RemoteBytes, end: int) -> bytearray:
    if end > start.size:
        raise HeaderError(f"ends within its header, at byte {start.size}")
    if end > HEADER_LIMIT:
        raise HeaderError(f"has a header of more than {HEADER_LIMIT >> 20} MiB")
    return start.upto(end)


def _whole(listing: Listing, hub: Hub, name: str) -> bytes | None:
    """A small file; None where there is none."""
    if name not in listing.files:
        return None
    start = _start(listing, hub, name)
    if start.size > _JSON_LIMIT:
        raise PullError("wrong_content", f"{name} has {start.size:,} bytes, expected at most {_JSON_LIMIT:,}")
    return bytes(start.upto(start.size))


def _size(listing: Listing, names: tuple[str, ...]) -> int:
    return sum(file.size for name in names if (file := listing.files[name]) is not None)
