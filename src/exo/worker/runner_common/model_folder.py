"""A folder of safetensors: the model card's keys that name it, its place on disk, its files, and checks of them.

The folder is checked before any library reads it, so that an error names the file and the reason.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError, field_validator, model_validator

from exo.worker.runner_common.header_source import HeaderError
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_name import stays_inside
from exo.worker.runner_common.safetensors import SafetensorsTensor, open_safetensors

Json = dict[str, JsonValue]

_OBJECT: TypeAdapter[Json] = TypeAdapter(Json)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class FolderOptions(BaseModel):
    """The model card's keys shared by all engines that read such folders.

    Without path and repo, the model id is the repo.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str | None = None
    """A folder with config.json and safetensors. A relative path is looked for in the models directories."""
    repo: str | None = None
    chat_template: str | None = None
    """Jinja source that replaces the folder's own template."""

    _stays_inside = field_validator("path", "repo")(stays_inside)

    @model_validator(mode="after")
    def _names_one_folder(self) -> "FolderOptions":
        if self.path is not None and self.repo is not None:
            raise ValueError("give either path or repo")
        return self


def find_folder(options: FolderOptions, model_id: str, directories: Sequence[str]) -> Path:
    """The folder to load. Raises LoadError with code ``model_not_found``, naming the places searched.

    Symbolic links are followed: a user who can make one in a models directory owns the directory.
    """
    places = list(_places(options, model_id, directories))
    found = next((path for path in places if path.is_dir()), None)
    if found is None:
        looked = ", ".join(str(place) for place in places) or "nowhere, because there is no models directory"
        raise LoadError("model_not_found", f"no model folder for {model_id}: looked for {looked}")
    return found


def check_folder(folder: Path) -> Json:
    """The folder's config.json. Raises LoadError for a folder that is no model or asks to run code of its own."""
    config = _read_object(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise _broken(f"{folder / 'config.json'} does not say its model_type")
    tokenizer = read_optional(folder, "tokenizer_config.json")
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        for key in ("auto_map", "model_file"):
            if key in content:
                raise _broken(f"{folder / name} has {key}, which asks to run code from the folder; that is never done")
    tensors(folder)
    return config


def language_config(config: Json) -> Json:
    """config.json with the language model's sizes at the top; models with a vision part nest them."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def tensors(folder: Path) -> dict[str, SafetensorsTensor]:
    """All tensors of the folder by name. Raises LoadError for a file that is not what its header says."""
    return {name: tensor for file in weight_files(folder) for name, tensor in file_tensors(file).items()}


def file_tensors(path: Path) -> Mapping[str, SafetensorsTensor]:
    """The tensors of one file. Raises LoadError for a broken file, which an engine would notice too late."""
    try:
        return open_safetensors(path)
    except HeaderError as error:
        raise _broken(f"{path} {error}") from error
    except OSError as error:
        raise _broken(f"{path} cannot be read: {error.strerror}") from error


def read_optional(folder: Path, name: str) -> Json:
    """The JSON object in a file of the folder; empty without the file. Raises LoadError."""
    return _read_object(folder / name) if (folder / name).exists() else {}


def _places(options: FolderOptions, model_id: str, directories: Sequence[str]) -> Iterator[Path]:
    if options.path is not None:
        path = Path(options.path).expanduser()
        if path.is_absolute():
            yield path
            return
        names = [options.path, f"{model_id.replace('/', '--')}/{options.path}"]
    else:
        names = [(options.repo or model_id).replace("/", "--")]
    for directory in directories:
        for name in names:
            yield Path(os.path.normpath(Path(directory) / name))


def _read_object(path: Path) -> Json:
    try:
        return _OBJECT.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise _broken(f"{path} is missing") from None
    except OSError as error:
        raise _broken(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise _broken(f"{path} is not a JSON object: {error.errors()[0]['msg']}") from error


def weight_files(folder: Path) -> list[Path]:
    """Every ``model*.safetensors``, as mlx-lm has it. Raises LoadError without any, or if the index names another."""
    found = sorted(folder.glob("model*.safetensors"))
    if not found:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        held = f"; {pickles[0]} is a pickle, which may run code and is never loaded" if pickles else ""
        raise _broken(f"{folder} has no model*.safetensors{held}")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = _read_object(index).get("weight_map")
        names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set[str]()
        if missing := sorted(names - {path.name for path in found}):
            raise _broken(f"{index} lists {missing[0]}, which is not there")
    return found


def _broken(message: str) -> LoadError:
    return LoadError("model_load_failed", message)
