"""A model's folder of safetensors: the keys of a card's table that name it, where it is, and whether it is whole.

It is checked before any library reads it, so that what is wrong with it can be said in plain words.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import (
    BaseModel,
    ConfigDict,
    JsonValue,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_name import stays_inside

Json = dict[str, JsonValue]

_OBJECT: TypeAdapter[Json] = TypeAdapter(Json)
_HEADER_LIMIT = 100 << 20
"""Bytes; safetensors' own."""
_SIZES = {1: "BOOL U8 I8 F8_E4M3 F8_E5M2", 2: "U16 I16 F16 BF16", 4: "U32 I32 F32", 8: "U64 I64 F64 C64"}
_BYTES = {name: size for size, names in _SIZES.items() for name in names.split()}
"""Bytes of an element, by safetensors' name of its type."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class FolderOptions(BaseModel):
    """Keys that the tables of all engines share which read such folders.

    Without path and repo, the model id is the repo.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str | None = None
    """A folder with config.json and safetensors; a relative path is looked for in the models directories."""
    repo: str | None = None
    chat_template: str | None = None
    """Jinja source that replaces the folder's own template."""

    _stays_inside = field_validator("path", "repo")(stays_inside)

    @model_validator(mode="after")
    def _names_one_folder(self) -> "FolderOptions":
        if self.path is not None and self.repo is not None:
            raise ValueError("give either path or repo")
        return self


class Tensor(BaseModel):
    """One entry of a safetensors header. Offsets are bytes from the header's end."""

    model_config = ConfigDict(extra="forbid")

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


_TENSORS = TypeAdapter(dict[str, Tensor])


def find_folder(options: FolderOptions, model_id: str, directories: Sequence[str]) -> Path:
    """The folder to load. Raises LoadError with code ``model_not_found``, naming where it was looked for.

    A symbolic link is followed wherever it leads: whoever can make one in a models directory owns what is there.
    """
    places = list(_places(options, model_id, directories))
    found = next((path for path in places if path.is_dir()), None)
    if found is None:
        looked = ", ".join(str(place) for place in places) or "nowhere, as there is no models directory"
        raise LoadError("model_not_found", f"no model folder for {model_id}: looked for {looked}")
    return found


def check_folder(folder: Path) -> Json:
    """The folder's config.json. Raises LoadError for a folder that cannot be a model, or would run code of its own."""
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
    """With the numbers of the language model, which models with a vision part nest."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def tensors(folder: Path) -> dict[str, Tensor]:
    """Everything in the folder's weights. Raises LoadError for a file that is not what its header says."""
    return {name: tensor for file in _weights(folder) for name, tensor in file_tensors(file).items()}


def read_optional(folder: Path, name: str) -> Json:
    """A file of the folder that holds a JSON object; empty without it. Raises LoadError."""
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


def _weights(folder: Path) -> list[Path]:
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


def file_tensors(path: Path) -> dict[str, Tensor]:
    """What a file's header lists, once the file is known to have it: an engine would find out too late.

    Raises LoadError and OSError.
    The format is eight bytes with the header's length, the header, which is a JSON object, and the tensors, which
    follow each other without holes.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        header = file.read(length) if 0 < length <= min(size - 8, _HEADER_LIMIT) else b""
    try:
        entries = _OBJECT.validate_json(header)
        entries.pop("__metadata__", None)
        found = _TENSORS.validate_python(entries)
    except ValidationError:
        raise _broken(f"{path} is not a safetensors file") from None
    taken = 0
    for name, entry in sorted(found.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if begin != taken or end - begin != math.prod(entry.shape) * _BYTES.get(entry.dtype, math.nan):
            raise _broken(
                f"{path} is not a safetensors file: {name} is {entry.dtype} of shape {entry.shape} at bytes {begin} to"
                f" {end}, and {taken} are taken"
            )
        taken = end
    if size < 8 + length + taken:
        raise _broken(f"{path} is cut short: it has {size} bytes of {8 + length + taken}")
    return found


def _broken(message: str) -> LoadError:
    return LoadError("model_load_failed", message)
