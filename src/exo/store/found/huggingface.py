"""Models in Hugging Face's cache, as its own library, transformers, vLLM and newer versions of llama.cpp fill it.

models--<owner>--<name>/refs/main                     the newest commit that was asked for
models--<owner>--<name>/snapshots/<commit>/<file>     a link to the content
models--<owner>--<name>/blobs/<hash>                  the content
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from exo.store.found.look import Look
from exo.store.found.unread_model import ModelFiles, UnreadModel, UnusableError, complete, models_in, reason_of

PROGRAM = "Hugging Face's cache"
_PREFIX = "models--"
_COMMIT_LIMIT = 1000


def huggingface_models(root: Path, look: Look) -> Iterator[UnreadModel | UnusableError]:
    """Every model in the cache ``root``."""
    try:
        repositories = [name for name in look.names(root) if name.startswith(_PREFIX)]
    except OSError as error:
        yield UnusableError(root, reason_of(error))
        return
    for name in repositories:
        yield from _repository(root / name, name.removeprefix(_PREFIX).replace("--", "/", 1), look)


def _repository(folder: Path, repo: str, look: Look) -> Iterator[UnreadModel | UnusableError]:
    """The models of a repository, each from the newest snapshot that has all of it."""
    found: dict[str, UnreadModel | UnusableError] = {}
    try:
        snapshots = _snapshots(folder, look)
    except OSError as error:
        yield UnusableError(folder, reason_of(error))
        return
    for snapshot in snapshots:
        names: list[str] = []
        for inside, there in look.walk(snapshot, 1):
            if isinstance(there, OSError):
                yield UnusableError(inside, reason_of(there))
            else:
                names += [str((inside / name).relative_to(snapshot)) for name in there]
        for files in models_in(snapshot, names, look):
            if isinstance(files, UnusableError):
                found.setdefault("", files)
            elif not isinstance(found.get(files.label), UnreadModel):
                made = complete(snapshot, files, look, partial(_unread, repo, snapshot, files))
                if isinstance(made, UnreadModel) or files.label not in found:
                    found[files.label] = made
    yield from found.values()


def _unread(repo: str, snapshot: Path, files: ModelFiles, size: int) -> UnreadModel:
    return UnreadModel(
        name=f"hf/{repo}" + (f":{files.label}" if files.label else ""),
        path=snapshot / files.first,
        size=size,
        program=PROGRAM,
        removal=f"`hf cache rm model/{repo}` deletes it",
        quantization=files.label,
    )


def _snapshots(folder: Path, look: Look) -> list[Path]:
    """The snapshots, that of the main branch first and then the newest. Raises OSError."""
    try:
        main = look.read(folder / "refs" / "main", _COMMIT_LIMIT).decode().strip()
    except (OSError, ValueError):
        main = ""
    paths = [folder / "snapshots" / name for name in look.names(folder / "snapshots")]
    return sorted(
        (path for path in paths if path.is_dir()), key=lambda path: (path.name != main, -path.stat().st_mtime)
    )
