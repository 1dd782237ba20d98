"""Which files of a folder are the weights of its model, by names and index alone, on a disk or on a hub."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors")
_ALONE = "model.safetensors"
_NO_WEIGHTS = re.compile(r"adapter.*|.*lora.*|consolidated.*|optimizer.*|training.*|.*mmproj.*", re.I)
"""Adapters, another layout of the same weights, and what training leaves behind."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Names of files. ``ignored`` are safetensors files beside them, ``missing`` parts that are not there."""

    names: tuple[str, ...]
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


class _Index(BaseModel):
    weight_map: dict[str, str]


def names_in_index(content: bytes) -> frozenset[str]:
    """The names of files in an index. Raises ValueError, whose message continues a sentence about the index."""
    try:
        names = frozenset(_Index.model_validate_json(content).weight_map.values())
    except ValidationError as error:
        raise ValueError(f"is no index of weights: {error.errors()[0]['msg']}") from error
    for name in sorted(names):
        if "/" in name or not name.endswith(SUFFIX):
            raise ValueError(f"lists {name[:100]!r}, which is no safetensors file of the folder itself")
    return names


def choose_weights(names: Collection[str], indexed: Collection[str] | None) -> Weights:
    """The files that an index names if there is one; else the one file or the one split set of files.

    ``names`` are the files at the top of a folder, ``indexed`` those in the index. Without weights, ``names`` is empty.
    """
    held = sorted(name for name in names if name.endswith(SUFFIX) and "/" not in name)
    chosen = sorted(set(indexed)) if indexed is not None else _without_index(held)
    there = tuple(name for name in chosen if name in held)
    missing = tuple(name for name in chosen if name not in held)
    return Weights(there, missing, tuple(name for name in held if name not in chosen))


def _without_index(held: list[str]) -> list[str]:
    if _ALONE in held:
        return [_ALONE]
    sets = {(part[1], int(part[3])) for name in held if (part := _PART.fullmatch(name))}
    sets = {found for found in sets if not _NO_WEIGHTS.fullmatch(found[0])}
    preferred = {found for found in sets if found[0] == "model"} or sets
    if len(preferred) == 1:
        stem, count = preferred.pop()
        return [f"{stem}-{number:05}-of-{count:05}{SUFFIX}" for number in range(1, count + 1)]
    others = [name for name in held if not _NO_WEIGHTS.fullmatch(name) and not _PART.fullmatch(name)]
    return others if len(others) == 1 and not sets else []
