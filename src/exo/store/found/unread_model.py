"""A file or folder in another program's folder that looks like a model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from exo.cards.card import SamplingDefaults
from exo.store.file_selection import folder_set, gguf_sets
from exo.store.found.look import Look
from exo.worker.runner_common.model_files.folder_weights import INDEX, SUFFIX, names_in_index

_INDEX_LIMIT = 32 << 20


class UnusableError(Exception):
    """A file that is no model that exo can load, and the reason. Its name may be any bytes; the message is text."""

    def __init__(self, path: Path, reason: str) -> None:
        text = f"{path}: {reason}"
        super().__init__("".join(each if each.isprintable() else "\ufffd" for each in text))


@dataclass(frozen=True, slots=True)
class UnreadModel:
    """A complete model by the names of its files, which have not been read."""

    name: str
    """The model id that it would have."""
    path: Path
    """A GGUF file, the first part of a split one, or a folder."""
    size: int
    program: str
    """The program that keeps it, as in a list."""
    removal: str
    """The way to delete it, as a clause."""
    quantization: str = ""
    aliases: tuple[str, ...] = ()
    sampling: SamplingDefaults | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model in a folder."""

    label: str
    """The quantisation of a GGUF file, or its name if that gives none; empty for a folder of safetensors."""
    first: str
    """The file to load, relative to the folder; empty for the folder itself."""
    names: tuple[str, ...]
    missing: tuple[str, ...]


def models_in(folder: Path, names: Sequence[str], look: Look) -> Iterator[ModelFiles | UnusableError]:
    """The models among the files ``names`` of a folder, complete or not."""
    ggufs = gguf_sets(names)
    labels = [each.label for each in ggufs]
    for each in ggufs:
        stem = Path(each.names[0]).name.removesuffix(".gguf")
        label = each.label if labels.count(each.label) == 1 else stem
        yield ModelFiles(label, each.names[0], each.names, each.missing)
    if not any(name.endswith(SUFFIX) for name in names):
        return
    indexed = None
    if INDEX in names:
        try:
            indexed = names_in_index(look.read(folder / INDEX, _INDEX_LIMIT))
        except (OSError, ValueError) as error:
            yield UnusableError(folder / INDEX, reason_of(error))
            return
    found = folder_set(names, indexed)
    if not found and not ggufs:
        yield UnusableError(folder, "has safetensors, but no config.json or no weights of a model")
    for each in found:
        yield ModelFiles("", "", each.names, each.missing)


def complete(
    folder: Path, files: ModelFiles, look: Look, make: Callable[[int], UnreadModel]
) -> UnreadModel | UnusableError:
    """What ``make`` makes of the size of the files, if all are there."""
    if files.missing:
        return UnusableError(folder / files.first, f"is not complete: {files.missing[0]} is not there")
    sizes = {name: look.size(folder / name) for name in files.names}
    if lacking := next((name for name, size in sizes.items() if size is None), None):
        return UnusableError(folder / lacking, "is no file, or a link that leads to none")
    return make(sum(size or 0 for size in sizes.values()))


def reason_of(error: Exception) -> str:
    """An error as the predicate of a sentence whose subject is the file."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error)
