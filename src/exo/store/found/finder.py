"""Finds the models that other programs keep on this machine, and makes model cards of them in memory.

Nothing is copied, written or hashed. A GGUF file is read up to its vocabulary, and a folder's configuration is read,
only once each unless the file changes.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import final

from pydantic import ValidationError

from exo.cards.catalogue import Found, FoundModel, Stamp, stamp_of
from exo.config import OtherFolders
from exo.store.discover.description import HEADER_LIMIT, SENTENCE_TRANSFORMER, Description, DescriptionError, from_gguf
from exo.store.discover.new_card import folder_tables, gguf_tables, new_card
from exo.store.found.folders import further_models, llamacpp_models, lmstudio_models, stem
from exo.store.found.huggingface import huggingface_models
from exo.store.found.look import Look
from exo.store.found.ollama import ollama_models
from exo.store.found.unread_model import UnreadModel, UnusableError, complete, models_in, reason_of
from exo.store.local import describe_folder
from exo.worker.runner_common.model_files.gguf import read_gguf, split_parts
from exo.worker.runner_common.model_files.header_source import HeaderError, LocalHeader

_LOOK_SECONDS = 5.0
"""Time between two looks of a server at other programs' folders, which may be large."""
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]|(?<![A-Za-z0-9._-])[.-]")
_Search = Callable[[Path, Look], Iterator[UnreadModel | UnusableError]]


@final
class Finder:
    """Gives the models that are there now, as the same object while nothing has changed."""

    def __init__(self, folders: OtherFolders, own: Sequence[FoundModel] = ()) -> None:
        """``own`` are models that the user has named by their paths."""
        searches: tuple[tuple[_Search, tuple[Path, ...]], ...] = (
            (huggingface_models, folders.huggingface),
            (ollama_models, folders.ollama),
            (lmstudio_models, folders.lmstudio),
            (llamacpp_models, folders.llamacpp),
            (further_models, folders.further),
        )
        self._searches = [(search, root) for search, roots in searches for root in roots]
        self._own = tuple(own)
        self._found: Found | None = None
        self._look = Look()
        self._next_look = 0.0

    def __call__(self) -> Found:
        """Looks again if the last look is some seconds old and a folder or file has changed since."""
        now = time.monotonic()
        if self._found is None:
            self._found = self._search()
        elif now < self._next_look:
            return self._found
        elif not self._look.unchanged() and (found := self._search()) != self._found:
            self._found = found
        self._next_look = now + _LOOK_SECONDS
        return self._found

    def _search(self) -> Found:
        self._look = Look()
        models = {each.card.model_id: each for each in self._own}
        unusable: list[str] = []
        for search, root in self._searches:
            for each in search(root, self._look):
                try:
                    if isinstance(each, UnusableError):
                        raise each
                    model = found_model(each)
                    first = models.setdefault(model.card.model_id, model)
                    if first is not model and first.path != model.path:
                        raise UnusableError(each.path, f"has the name {model.card.model_id}, as {first.path} has")
                except UnusableError as error:
                    unusable.append(str(error))
        return Found(tuple(models.values()), tuple(dict.fromkeys(unusable)))


def model_at(path: Path) -> FoundModel:
    """The model that a path of the user's names: a GGUF file, or a folder of safetensors. Raises UnusableError."""
    look = Look()
    path = path.absolute()
    folder = path if path.is_dir() else path.parent
    try:
        names = look.names(folder) if path.is_dir() else [part.name for part in split_parts(path) if part.exists()]
    except OSError as error:
        raise UnusableError(folder, reason_of(error)) from error
    found = list(models_in(folder, names, look))
    if len(found) != 1 and path.is_dir():
        several = ", ".join(each.first for each in found if not isinstance(each, UnusableError))
        raise UnusableError(path, f"is a folder of several models; name one: {several}" if several else "has no model")
    if not found:
        raise UnusableError(path, "is not there" if not path.exists() else "is no GGUF file and no folder of a model")
    files = found[0]
    if isinstance(files, UnusableError):
        raise files

    def make(size: int) -> UnreadModel:
        name = f"local/{stem(files) or folder.name}"
        loaded = folder / files.first
        return UnreadModel(name, loaded, size, "a path", f"delete {loaded} yourself", files.label)

    made = complete(folder, files, look, make)
    if isinstance(made, UnusableError):
        raise made
    return found_model(made)


def found_model(model: UnreadModel) -> FoundModel:
    """The model with a model card. Raises UnusableError for one that is no language model that exo can load."""
    path = model.path
    model_id = "/".join(_usable(part) for part in model.name.split("/"))
    try:
        str(path).encode()  # the protocol with the runners is JSON
        if path.is_dir():
            description = _described_folder(path, stamp_of(path / "config.json"))
            tables, backends = folder_tables(description, path=str(path))
        else:
            description = _described_file(path, stamp_of(path))
            tables, backends = gguf_tables(path=str(path))
        if model.quantization:
            description = replace(description, quantization=model.quantization)
        card = new_card(
            model_id, description, tables, backends, model.size, aliases=model.aliases, sampling=model.sampling
        )
    except (HeaderError, DescriptionError, OSError) as error:
        raise UnusableError(path, reason_of(error)) from error
    except ValidationError as error:
        raise UnusableError(path, f"would have the name {model_id}, which cannot be one of a model") from error
    except UnicodeEncodeError as error:
        raise UnusableError(path, "has a path that is not UTF-8") from error
    return FoundModel(card, model.program, path, model.removal, model.notes)


def _usable(part: str) -> str:
    name, colon, tag = part.partition(":")
    return _NOT_IN_A_NAME.sub("_", name) + colon + _NOT_IN_A_NAME.sub("_", tag)


@lru_cache(maxsize=4096)
def _described_file(path: Path, _stamp: Stamp | None) -> Description:
    try:
        return from_gguf(read_gguf(LocalHeader(path), limit=HEADER_LIMIT, before="tokenizer."))
    except HeaderError:  # some writers put the vocabulary first
        return from_gguf(read_gguf(LocalHeader(path), limit=HEADER_LIMIT, tensors=False))


@lru_cache(maxsize=4096)
def _described_folder(path: Path, _stamp: Stamp | None) -> Description:
    embeds = (path / SENTENCE_TRANSFORMER).exists()
    description = describe_folder(path, embeds=embeds)
    if description.other_class and not embeds:
        raise DescriptionError(f"is no language model, but a {description.other_class}")
    return description
