"""Models in plain folders: LM Studio's, llama.cpp's, and further ones of the user.

LM Studio    <publisher>/<model>/<file>.gguf, or the files of a folder of safetensors
llama.cpp    <owner>_<repository>_<file>.gguf beside manifest=<owner>=<repository>=<tag>.json
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exo.store.found.look import Look
from exo.store.found.unread_model import ModelFiles, UnreadModel, UnusableError, complete, models_in, reason_of
from exo.worker.protocol.wire import describe

_DEPTH = 4
_NAMED_FOLDERS = 3
"""Folders that are part of a model's name."""
_MANIFEST_LIMIT = 1 << 20


def lmstudio_models(root: Path, look: Look) -> Iterator[UnreadModel | UnusableError]:
    """Every model in LM Studio's folder ``root``."""
    return _tree(root, look, "lmstudio", "LM Studio")


def further_models(root: Path, look: Look) -> Iterator[UnreadModel | UnusableError]:
    """Every model in a folder of the user's and the folders below."""
    return _tree(root, look, "local", "a folder of yours")


def llamacpp_models(root: Path, look: Look) -> Iterator[UnreadModel | UnusableError]:
    """Every model in the folder ``root``, into which older versions of llama.cpp download."""
    try:
        names = look.names(root)
    except OSError as error:
        yield UnusableError(root, reason_of(error))
        return
    repos: dict[str, str] = {}
    for name in names:
        if name.startswith("manifest=") and name.endswith(".json"):
            try:
                file, repo = _file_and_repo(root / name, look)
                repos[file] = repo
            except ValidationError as error:
                yield UnusableError(root / name, f"is no manifest of llama.cpp: {describe(error)[1]}")
            except (OSError, ValueError) as error:
                yield UnusableError(root / name, reason_of(error))
    ggufs = [name for name in names if name.endswith(".gguf")]
    for repo in dict.fromkeys(repos.get(name) for name in ggufs):
        for files in models_in(root, [name for name in ggufs if repos.get(name) == repo], look):
            if isinstance(files, UnusableError):
                yield files
                continue
            name = f"llama.cpp/{f'{repo}:{files.label}' if repo else stem(files)}"
            yield complete(root, files, look, partial(_unread, name, root, files, "llama.cpp's cache"))


def _tree(root: Path, look: Look, prefix: str, program: str) -> Iterator[UnreadModel | UnusableError]:
    for folder, names in look.walk(root, _DEPTH):
        if isinstance(names, OSError):
            yield UnusableError(folder, reason_of(names))
            continue
        parts = folder.relative_to(root).parts[:_NAMED_FOLDERS]
        for files in models_in(folder, names, look):
            if isinstance(files, UnusableError):
                yield files
                continue
            tag = f":{files.label}" if parts and files.label else ""
            name = "/".join((prefix, *(parts or (stem(files) or root.name,)))) + tag
            yield complete(folder, files, look, partial(_unread, name, folder, files, program))


def _unread(name: str, folder: Path, files: ModelFiles, program: str, size: int) -> UnreadModel:
    path = folder / files.first
    return UnreadModel(name, path, size, program, f"delete {path} yourself", files.label)


def stem(files: ModelFiles) -> str:
    """The name of a GGUF file without its ending; empty for a folder."""
    return Path(files.first).name.removesuffix(".gguf")


class _ManifestFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str = Field(alias="rfilename")


class _LlamaCppManifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    file: _ManifestFile = Field(alias="ggufFile")


def _file_and_repo(path: Path, look: Look) -> tuple[str, str]:
    """The file that a manifest is for, and its repository. Raises OSError and ValueError."""
    parts = path.name.split("=")
    if len(parts) != 4:
        raise ValueError("has a name without owner, repository and tag")
    _, owner, name, _ = parts
    manifest = _LlamaCppManifest.model_validate_json(look.read(path, _MANIFEST_LIMIT))
    return f"{owner}_{name}_{manifest.file.name}".replace("/", "_"), f"{owner}/{name}"
