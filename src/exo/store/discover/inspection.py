"""Finds out what a repository on the hub holds for a runner, from the beginnings of its files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import JsonValue

from exo.store.discover.description import (
    HEADER_LIMIT,
    SENTENCE_TRANSFORMER,
    Description,
    DescriptionError,
    from_folder,
    from_gguf,
)
from exo.store.discover.new_card import folder_tables, gguf_tables
from exo.store.discover.remote_bytes import indexed, small_file, start_of
from exo.store.errors import PullError
from exo.store.file_selection import Source, quantisations, select
from exo.store.hub import Hub, Listing
from exo.worker.runner_common.model_files.gguf import read_gguf
from exo.worker.runner_common.model_files.header_source import HeaderError

DEFAULT_QUANT = "Q4_K_M"
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class Inspected:
    """A model, and a model card's tables for it by runner."""

    tables: Mapping[str, dict[str, JsonValue]]
    backends: tuple[str, ...]
    """The backends of the runners in ``tables``, the preferred one first."""
    description: Description
    files: tuple[str, ...]
    """The files that a pull will fetch."""
    bytes: int
    notes: tuple[str, ...] = ()
    """Decisions made for the user."""


def inspect(listing: Listing, hub: Hub, quant: str | None) -> Inspected:
    """Describes the GGUF file of this quantisation or, in a repository without GGUF files, the folder's model.

    Raises PullError for anything else, for a broken file, and if the user has to choose the quantisation.
    """
    return _gguf(listing, hub, quant) if quantisations(listing.files) else _folder(listing, hub, quant)


def _gguf(listing: Listing, hub: Hub, quant: str | None) -> Inspected:
    repo, labels = listing.repo, quantisations(listing.files)
    label = quant or (labels[0] if len(labels) == 1 else DEFAULT_QUANT)
    if quant is None and label not in labels:
        raise PullError("no_match", f"{repo} has {', '.join(labels)}; choose one, as in {repo}:{labels[0]}")
    chosen = select(Source(repo, "cuda", repo, quant=label), listing.files)
    first = chosen.names[0]
    start = start_of(listing, hub, first)
    description = _made(first, lambda: from_gguf(read_gguf(start, limit=HEADER_LIMIT, tensors=False)))
    other = next((each for each in labels if each != chosen.label), None)
    several = f"took {chosen.label} of {', '.join(labels)}; for another, say {repo}:{other}"
    notes = (several,) if quant is None and other is not None else ()
    tables, backends = gguf_tables(repo=repo, file=first)
    described = replace(description, quantization=chosen.label)
    return Inspected(tables, backends, described, chosen.names, _size(listing, chosen.names), notes)


def _folder(listing: Listing, hub: Hub, quant: str | None) -> Inspected:
    if quant is not None:
        raise PullError("no_match", f"{listing.repo} has no GGUF file, so there is no {quant}; leave it out")
    chosen = select(Source(listing.repo, "mlx", listing.repo), listing.files, indexed(listing, hub))
    embeds = SENTENCE_TRANSFORMER in listing.files
    description = _made("config.json", lambda: from_folder(lambda name: small_file(listing, hub, name), embeds=embeds))
    tables, backends = folder_tables(description, repo=listing.repo)
    return Inspected(tables, backends, description, chosen.names, _size(listing, chosen.names))


def _made(name: str, make: Callable[[], _Made]) -> _Made:
    try:
        return make()
    except (HeaderError, DescriptionError) as error:
        raise PullError("wrong_content", f"{name} {error}") from error


def _size(listing: Listing, names: tuple[str, ...]) -> int:
    return sum(file.size for name in names if (file := listing.files[name]) is not None)
