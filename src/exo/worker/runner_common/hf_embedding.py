"""Embeddings: the part that is the same in the runners that read Hugging Face's folders."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.model_folder import read_optional

Pooling = Literal["mean", "cls", "last"]
"""How tokens' vectors become one of the text."""

_MODES: dict[str, Pooling] = {
    "mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls", "lasttoken": "last",
}  # fmt: skip
"""Sentence Transformers' names: of a flag that is set, after "pooling_mode_", or the value of "pooling_mode"."""


class _Module(BaseModel):
    type: str
    path: str


_MODULES = TypeAdapter(list[_Module])


def choose_pooling(asked: Pooling | None, folder: Path, table: str) -> Pooling:
    """Returns the pooling that the card's ``table`` names, else the one in Sentence Transformers' file, else mean.

    Raises LoadError.
    """
    if asked is not None:
        return asked
    name = "1_Pooling/config.json"
    config = read_optional(folder, name)
    modes = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True and "_mode_" in key]
    modes += [mode] if isinstance(mode := config.get("pooling_mode"), str) else []
    if not (folder / name).exists():
        return "mean"
    if len(modes) == 1 and modes[0] in _MODES:
        return _MODES[modes[0]]
    said = " and ".join(modes) or "none"
    message = f"{folder / name} asks for the pooling {said}; [{table}] pooling may be mean, cls or last"
    raise LoadError("model_load_failed", message)


def dense_layers(folder: Path) -> list[Path]:
    """The layers that a pooled vector goes through at last, by Sentence Transformers' list of a folder's modules.

    Raises LoadError for a list that cannot be read, or leads out of the folder.
    """
    path = folder / "modules.json"
    try:
        modules = _MODULES.validate_json(path.read_bytes()) if path.exists() else []
    except (OSError, ValidationError) as error:
        raise LoadError("model_load_failed", f"{path} cannot be read: {error}") from error
    layers = [module.path for module in modules if module.type.endswith(".Dense")]
    if outside := next(
        (name for name in layers if not (folder / name).resolve().is_relative_to(folder.resolve())), None
    ):
        raise LoadError("model_load_failed", f"{path} has the layer {outside!r}, which is not in the folder")
    return [folder / name for name in layers]
