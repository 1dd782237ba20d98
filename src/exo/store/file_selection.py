"""Selects the files of a repository that a runner needs, by name alone, whether they are on the hub or on disk."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exo.cards.card import ModelCard, RepoId
from exo.store.errors import PullError
from exo.worker.protocol.runners import RUNNERS
from exo.worker.protocol.validation import describe
from exo.worker.runner_common.model_files.folder_weights import INDEX, SUFFIX, choose_weights

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.[a-z]+)")
"""A part of a split file, numbered from 00001, as llama.cpp and safetensors name it."""
_QUANT = re.compile(
    r"(?<![a-z0-9])((?:ud-)?(?:i?q[1-9](?:_[0-9a-z]{1,3})*|tq[12]_0|bf16|f16|f32|mxfp4(?:_moe)?|nvfp4))(?![a-z0-9])",
    re.I,
)
_OTHER_GGUF = re.compile(r"mmproj|imatrix", re.I)
"""GGUF files that are not language models."""
_DENSE = ("config.json", "model.safetensors")
_FOLDER = (
    "*.json", "*.jinja", "*.tiktoken", "tokenizer.model", "merges.txt", "vocab.txt", "1_Pooling/config.json",
    "additional_chat_templates/*.jinja",
    *(f"{place}_Dense/{name}" for place in (2, 3) for name in _DENSE),
)  # fmt: skip
"""The files of a model folder beside its weights: configuration and tokenizer, but nothing that could be code.

Subfolders are those of Sentence Transformers, for embedding models, and the one for further chat templates.
"""
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
"""The files of an adapter (LoRA) that is no GGUF."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class _FileKeys(BaseModel):
    """The keys of a runner's table that locate files. Only the runner reads the others."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    path: str | None = None
    repo: RepoId | None = None
    file: str | None = None


class _AdapterKeys(_FileKeys):
    name: str


class _RunnerTable(_FileKeys):
    mmproj: str | None = None
    draft: _FileKeys | None = None
    lora: tuple[_AdapterKeys, ...] = Field(default=(), strict=False)


@dataclass(frozen=True, slots=True)
class Source:
    """The location of a runner's files according to a card: a repository on the hub, or ``path`` on this machine."""

    model_id: str
    runner: str
    repo: str | None
    path: str | None = None
    file: str | None = None
    """Name or pattern of the GGUF file, or of any part of a split one."""
    mmproj: str | None = None
    """Name or pattern of the vision projector."""
    quant: str | None = None
    """A quantisation that replaces ``file``."""
    adapter: str = ""
    """The name of the adapter that the files are; empty for a model."""

    @classmethod
    def of(cls, card: ModelCard, runner: str, quant: str | None = None) -> "Source":
        """The source in a card. Raises PullError."""
        table = _table(card, runner)
        if runner == "cuda":
            return cls(card.model_id, runner, table.repo, table.path, table.file, table.mmproj, quant)
        if quant is not None:
            raise PullError("no_match", f"{runner} takes a whole repository; a quantisation is chosen for cuda only")
        return cls(card.model_id, runner, None if table.path else table.repo or card.model_id, table.path)

    @classmethod
    def of_draft(cls, card: ModelCard, runner: str) -> "Source | None":
        """The source of the draft model, if the card has one for the runner. Raises PullError.

        Other cards may use the same model, so it is stored in its own repository's folder.
        """
        draft = _table(card, runner).draft if runner == "cuda" else None
        if draft is None:
            return None
        return cls(draft.repo or card.model_id, runner, draft.repo, draft.path, draft.file)

    @classmethod
    def of_adapters(cls, card: ModelCard, runner: str) -> "list[Source]":
        """The sources of the card's adapters for the runner, each in its own repository's folder. Raises PullError."""
        return [
            cls(each.repo or card.model_id, runner, each.repo, each.path, each.file, adapter=each.name)
            for each in _table(card, runner).lora
        ]

    @classmethod
    def whole(cls, card: ModelCard, runner: str, quant: str | None = None) -> "list[Source]":
        """The source of the model, and those of what the card names beside it. Raises PullError."""
        draft = cls.of_draft(card, runner)
        beside = [*([draft] if draft is not None else []), *cls.of_adapters(card, runner)]
        return [cls.of(card, runner, quant), *beside]

    def required_repo(self) -> str:
        """The repository to pull from. Raises PullError if the card names none."""
        if self.repo is None:
            missing = f"names the path {self.path}, not a repository" if self.path else "names no repository"
            raise PullError("not_pullable", f"nothing to pull: the card of {self.model_id}, [{self.runner}], {missing}")
        return self.repo


def _table(card: ModelCard, runner: str) -> _RunnerTable:
    if runner not in RUNNERS:
        raise PullError("not_pullable", f"there is no runner {runner}; there are {', '.join(RUNNERS)}")
    try:
        return _RunnerTable.model_validate(card.engines.get(runner, {}))
    except ValidationError as error:
        raise PullError("not_pullable", f"card of {card.model_id}, [{runner}] {describe(error)[1]}") from error


@dataclass(frozen=True, slots=True)
class FileSet:
    """The files of one model, the one to load first. ``missing`` are the absent parts of a split file."""

    label: str
    """The quantisation; empty for a folder."""
    names: tuple[str, ...]
    missing: tuple[str, ...] = ()


def select(source: Source, names: Collection[str], indexed: Collection[str] | None = None) -> FileSet:
    """The files to pull from a repository that has these names; ``indexed`` are those in a folder's index of weights.

    Raises PullError, with a list of the quantisations, if not exactly one model fits.
    """
    repo = source.required_repo()
    found = file_sets(source, names, indexed)
    if not found:
        raise PullError("no_match", _no_match(source, repo, names))
    if len(found) > 1:
        several = ", ".join(found_set.label for found_set in found)
        if len({found_set.label for found_set in found}) < len(found):
            several = ", ".join(found_set.names[0] for found_set in found)
        raise PullError("no_match", f"{repo} has more than one {_wanted(source)}: {several}; choose one of them")
    chosen = found[0]
    if chosen.missing:
        raise PullError("no_match", f"{repo} is not complete: {chosen.missing[0]} is not there")
    return FileSet(chosen.label, (*chosen.names, *_projector(source, repo, names)))


def file_sets(source: Source, names: Collection[str], indexed: Collection[str] | None = None) -> list[FileSet]:
    """Every model among ``names`` that the source accepts, complete or not, in order of name and without projectors.

    ``indexed`` are the names in a folder's index of weights, if it has one.
    """
    if source.runner != "cuda":
        whole = [FileSet("", _ADAPTER)] if set(_ADAPTER) <= set(names) else []
        return whole if source.adapter else folder_set(names, indexed)
    found = gguf_sets(names)
    if source.quant is not None:
        return [ggufs for ggufs in found if ggufs.label == source.quant.upper()]
    pattern = source.path or source.file
    exact = [ggufs for ggufs in found if pattern in ggufs.names]
    if not exact and source.path is not None and source.path in names:  # another program's file, named by its hash
        return [FileSet(source.path, (source.path,))]
    return exact or [ggufs for ggufs in found if pattern and any(matches(pattern, name) for name in ggufs.names)]


def quantisations(names: Iterable[str]) -> tuple[str, ...]:
    """The quantisations of the GGUF files among ``names``."""
    return tuple(dict.fromkeys(ggufs.label for ggufs in gguf_sets(names)))


def projectors(source: Source, names: Iterable[str]) -> tuple[str, ...]:
    """The vision projectors among ``names`` that the card's table asks for."""
    return tuple(sorted(name for name in names if source.mmproj and matches(source.mmproj, name)))


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a file of a repository. As in the runner, ``*`` matches within the last segment."""
    wanted, file = PurePosixPath(pattern), PurePosixPath(name)
    return file.parent == wanted.parent and fnmatchcase(file.name, wanted.name)


def gguf_sets(names: Iterable[str]) -> list[FileSet]:
    """Every language model among the GGUF files, complete or not, in order of name."""
    parts: dict[tuple[str, int], list[str]] = {}
    for name in names:
        if name.lower().endswith(".gguf") and not _OTHER_GGUF.search(PurePosixPath(name).name):
            split = _PART.fullmatch(name)
            parts.setdefault((split[1], int(split[3])) if split else (name.removesuffix(".gguf"), 0), []).append(name)
    return [
        FileSet(_label(stem), tuple(sorted(found)), _missing(found[0], found))
        for (stem, _), found in sorted(parts.items())
    ]


def _label(stem: str) -> str:
    """The last quantisation in a file's name, or in its folder's name; otherwise the name itself."""
    path = PurePosixPath(stem)
    found = _QUANT.findall(path.name) or _QUANT.findall(path.parent.name)
    return str(found[-1]).upper() if found else path.name


def _missing(name: str, names: Collection[str]) -> tuple[str, ...]:
    """The parts of the split file ``name`` that are not in ``names``."""
    split = _PART.fullmatch(name)
    if split is None:
        return ()
    there = set(names)
    every = (f"{split[1]}-{part:05}-of-{split[3]}{split[4]}" for part in range(1, int(split[3]) + 1))
    return tuple(part for part in every if part not in there)


def folder_set(names: Collection[str], indexed: Collection[str] | None) -> list[FileSet]:
    """The model of a folder of safetensors, complete or not; none if it has no configuration or no weights."""
    weights = choose_weights(names, indexed)
    if "config.json" not in names or not (weights.names or weights.missing):
        return []
    beside = [name for name in names if any(matches(pattern, name) for pattern in _FOLDER)]
    wanted = {name for name in beside if name == INDEX or not name.endswith(".index.json")} | set(weights.names)
    return [FileSet("", ("config.json", *sorted(wanted - {"config.json"})), weights.missing)]


def folder_files(names: Iterable[str]) -> list[str]:
    """All files that may belong to a model folder, also by another revision's index."""
    patterns = (f"*{SUFFIX}", *_FOLDER)
    return sorted(name for name in names if name not in _ADAPTER and any(matches(each, name) for each in patterns))


def _projector(source: Source, repo: str, names: Collection[str]) -> tuple[str, ...]:
    found = projectors(source, names)
    if source.mmproj and len(found) != 1:
        held = ", ".join(name for name in sorted(names) if "mmproj" in name.lower()) or "none"
        raise PullError(
            "no_match", f"{repo} has {len(found)} files that match mmproj = {source.mmproj!r}; its projectors: {held}"
        )
    return found


def _wanted(source: Source) -> str:
    return f"GGUF file of quantisation {source.quant}" if source.quant else f"GGUF file that matches {source.file!r}"


def _no_match(source: Source, repo: str, names: Collection[str]) -> str:
    if source.runner == "cuda":
        return f"{repo} has no {_wanted(source)}; it has {', '.join(quantisations(names)) or 'no GGUF file at all'}"
    if source.adapter:
        return f"{repo} is no adapter (LoRA) for {source.runner}, which has {' and '.join(_ADAPTER)}"
    if "config.json" not in names and "adapter_config.json" in names:
        remedy = f"name it in [[{source.runner}.lora]] of that model's card"
        return f"{repo} is an adapter (LoRA) of another model: {remedy}"
    pickled = any(name.endswith(_PICKLES) for name in names)
    lacks = "no config.json" if "config.json" not in names else "no model*.safetensors"
    return f"{repo} has {lacks}, so {source.runner} cannot load it" + ("; pickles are never fetched" if pickled else "")
