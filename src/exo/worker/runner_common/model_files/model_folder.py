"""A folder of safetensors: the model card's keys that name it, its place on disk, and the one reading of its files.

The folder is read before any library sees it, so that an error names the file and the reason. Libraries then get
``presented``, a folder with only the files that were read.
"""

import json
import os
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError, field_validator, model_validator

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.file_kind import what_it_is
from exo.worker.runner_common.model_files.folder_config import Json, normalised, wrong_setting
from exo.worker.runner_common.model_files.folder_templates import chat_templates
from exo.worker.runner_common.model_files.folder_weights import INDEX, SUFFIX, choose_weights, names_in_index
from exo.worker.runner_common.model_files.header_source import HeaderError
from exo.worker.runner_common.model_files.model_name import stays_inside
from exo.worker.runner_common.model_files.safetensors import SafetensorsTensor, open_safetensors

_OBJECT: TypeAdapter[Json] = TypeAdapter(Json)
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")
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
    if found is None and (file := next((path for path in places if path.is_file()), None)) is not None:
        remedy = "name it in the [cuda] table" if file.suffix == ".gguf" else "name the folder that holds it"
        raise LoadError("model_load_failed", f"{file} is a file, and the path of this table is a folder: {remedy}")
    if found is None:
        looked = ", ".join(str(place) for place in places) or "nowhere, because there is no models directory"
        raise LoadError("model_not_found", f"no model folder for {model_id}: looked for {looked}")
    return found


@dataclass(frozen=True, slots=True)
class HfFolder:
    """A folder as all readers see it. ``written`` is config.json, ``config`` the same with both forms of settings."""

    path: Path
    written: Json
    config: Json
    weights: tuple[Path, ...]
    tensors: Mapping[str, SafetensorsTensor]
    ignored: tuple[str, ...]
    """Names of safetensors files that are no part of the model."""
    templates: Mapping[str, str]
    """Chat templates; see ``folder_templates``."""
    names_code: bool
    """Whether it asks to run code of its own."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the folder."""
        reason = "the engine has the architecture itself"
        return (f"the folder names code of its own (auto_map), which is not run: {reason}",) if self.names_code else ()


def read_folder(path: Path) -> HfFolder:
    """Reads configuration, index and the headers of the weights.

    Raises LoadError for a folder that is no model, is incomplete, or names a program of its own as the model.
    """
    if not (path / "config.json").exists() and (other := _other_folder(path)) is not None:
        raise _broken(f"{path} has no config.json: it is {other}")
    written = _read_object(path / "config.json")
    if not isinstance(written.get("model_type"), str):
        raise _broken(f"{path / 'config.json'} does not say its model_type")
    if "model_file" in written:
        reason = "which asks to run code from the folder; that is never done"
        raise _broken(f"{path / 'config.json'} has model_file, {reason}")
    config = normalised(written)
    if (wrong := wrong_setting(config)) is not None:
        raise _broken(f"{path / 'config.json'} has {wrong}")
    names, ignored = _weights(path)
    weights = tuple(path / name for name in names)
    names_code = "auto_map" in written or "auto_map" in read_optional(path, "tokenizer_config.json")
    templates = _templates(path)
    tensors = _tensors(weights)
    _require_tokenizer(path)
    return HfFolder(path, written, config, weights, tensors, ignored, templates, names_code)


def end_tokens(folder: Path, value: JsonValue) -> list[int]:
    """The ids that a configuration's eos_token_id names: one, several or none. Raises LoadError."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    found = [each for each in values if isinstance(each, int) and not isinstance(each, bool)]
    if len(found) < len(values):
        raise _broken(f"{folder} has eos_token_id = {value!r}, expected the number of a token or a list of numbers")
    return found


def tell_ignored(folder: HfFolder) -> None:
    """Tells the log which files of the folder look like weights and are not loaded."""
    if folder.ignored:
        reason = "the index does not name them" if (folder.path / INDEX).exists() else "they are no part of the model"
        print(f"{folder.path}: not loaded: {', '.join(folder.ignored)}; {reason}", file=sys.stderr)


@contextmanager
def presented(folder: HfFolder, config: Json) -> Generator[Path]:
    """A directory of links for a library that looks for files by itself: the model's files alone, and this config.json.

    ``auto_map``, which asks to run code from the folder, is left out. Raises OSError.
    """
    with TemporaryDirectory(prefix="exo-model-") as name:
        view = Path(name)
        tokenizer = read_optional(folder.path, "tokenizer_config.json")
        written = {"config.json": config} | ({"tokenizer_config.json": tokenizer} if tokenizer else {})
        for file, content in written.items():
            kept = {key: value for key, value in content.items() if key != "auto_map"}
            (view / file).write_text(json.dumps(kept), encoding="utf-8")
        for entry in folder.path.iterdir():
            if entry.name not in (*written, INDEX) and entry.suffix not in (SUFFIX, ".py"):
                (view / entry.name).symlink_to(entry.absolute())
        count = len(folder.weights)
        for number, file in enumerate(folder.weights, start=1):
            part = f"-{number:05}-of-{count:05}" if count > 1 else ""
            (view / f"model{part}{SUFFIX}").symlink_to(file.absolute())
        try:
            yield view
        except LoadError as error:
            raise LoadError(error.code, str(error).replace(name, str(folder.path))) from error


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
        content = path.read_bytes()
        if (kind := what_it_is(content[:64])) is not None:
            raise _broken(f"{path} is not a JSON object: it is {kind}")
        return _OBJECT.validate_json(content)
    except FileNotFoundError:
        raise _broken(f"{path} is missing") from None
    except OSError as error:
        raise _broken(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise _broken(f"{path} is not a JSON object: {error.errors()[0]['msg']}") from error


def _templates(path: Path) -> dict[str, str]:
    try:
        return chat_templates(lambda name: (path / name).read_bytes() if (path / name).is_file() else None)
    except OSError as error:
        raise _broken(f"{error.filename} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _broken(f"{path} {error}") from error


def _other_folder(path: Path) -> str | None:
    """A folder without a configuration, with the remedy."""
    if (path / "adapter_config.json").exists():
        base = read_optional(path, "adapter_config.json").get("base_model_name_or_path")
        return f"an adapter (LoRA) of {base or 'another model'}: merge it into that model, and serve the result"
    if (path / "model_index.json").exists():
        return "a model that makes pictures, which no engine here computes"
    if ggufs := sorted(file.name for file in path.glob("*.gguf")):
        return f"a folder of GGUF files, such as {ggufs[0]}: name one of them in the model card's [cuda] table"
    return None


def _tensors(weights: Sequence[Path]) -> dict[str, SafetensorsTensor]:
    """Returns all tensors of the model by name. Raises LoadError for a file that is not what its header says."""
    found: dict[str, SafetensorsTensor] = {}
    for file in weights:
        held = file_tensors(file)
        if twice := sorted(found.keys() & held.keys()):
            raise _broken(f"{file} has the tensor {twice[0]}, which another file of the model has, too")
        found |= held
    return found


def _require_tokenizer(path: Path) -> None:
    """Raises LoadError for a folder without a tokenizer, and for one whose tokenizer is something else."""
    found = next((file for name in _TOKENIZERS for file in path.glob(name)), None)
    if found is None:
        raise _broken(f"{path} has no tokenizer: tokenizer.json is missing; download it into the folder")
    with found.open("rb") as file:
        kind = what_it_is(file.read(64))
    if kind is not None:
        raise _broken(f"{found} is no tokenizer: it is {kind}")


def _weights(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the files that are the model's weights, and of others beside them. Raises LoadError."""
    chosen = choose_weights([path.name for path in folder.iterdir()], _indexed(folder))
    if chosen.missing:
        how = f"{folder / INDEX} lists" if (folder / INDEX).exists() else f"the model in {folder} is split, and needs"
        raise _broken(f"{how} {chosen.missing[0]}, which is not there")
    if not chosen.names:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        held = f"; {pickles[0]} is a pickle, which may run code and is never loaded" if pickles else ""
        if chosen.ignored:
            held = f"; it has {', '.join(chosen.ignored[:3])}, and no {INDEX} that says which of them are the model"
        raise _broken(f"{folder} has no model*.safetensors{held}")
    return chosen.names, chosen.ignored


def _indexed(folder: Path) -> frozenset[str] | None:
    """The names of the files in a folder's index; None without one. Raises LoadError."""
    if not (folder / INDEX).exists():
        return None
    try:
        return names_in_index((folder / INDEX).read_bytes())
    except OSError as error:
        raise _broken(f"{folder / INDEX} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _broken(f"{folder / INDEX} {error}") from error


def _broken(message: str) -> LoadError:
    return LoadError("model_load_failed", message)
