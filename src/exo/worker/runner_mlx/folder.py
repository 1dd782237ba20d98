"""Checks a model's folder before any library reads it, so that what is wrong with it can be said in plain words."""

import json
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError

from exo.worker.runner_mlx.options import LoadError

Json = dict[str, JsonValue]

_OBJECT: TypeAdapter[Json] = TypeAdapter(Json)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def check_folder(folder: Path) -> Json:
    """The folder's config.json. Raises LoadError for a folder that cannot be a model, or would run code of its own."""
    config = _read_object(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise _broken(f"{folder / 'config.json'} does not say its model_type")
    for name, content in (("config.json", config), *_optional(folder, "tokenizer_config.json")):
        for key in ("auto_map", "model_file"):
            if key in content:
                raise _broken(f"{folder / name} has {key}, which asks to run code from the folder; that is never done")
    for file in _weights(folder):
        _check_safetensors(file)
    return config


def _optional(folder: Path, name: str) -> list[tuple[str, Json]]:
    return [(name, _read_object(folder / name))] if (folder / name).exists() else []


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


def _check_safetensors(path: Path) -> None:
    """Whether the file is as long as its header says: MLX would find out only while it computes.

    The format is eight bytes with the header's length, the header, which is a JSON object, and the tensors.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        header = file.read(length) if 0 < length <= size - 8 else b""
    try:
        entries = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, AttributeError, LookupError, TypeError):
        raise _broken(f"{path} is not a safetensors file") from None
    if size < 8 + length + end:
        raise _broken(f"{path} is cut short: it has {size} bytes of {8 + length + end}")


def _broken(message: str) -> LoadError:
    return LoadError("model_load_failed", message)
