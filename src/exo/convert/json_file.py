"""JSON files, read into pydantic models and written so that they survive a power cut."""

import json
import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, JsonValue, ValidationError

from exo.convert.report import ConvertError
from exo.worker.protocol.wire import describe

_Model = TypeVar("_Model", bound=BaseModel)


def read_json(path: Path, model: type[_Model]) -> _Model:
    """Raises ConvertError naming the file and the key."""
    if not path.is_file():
        raise ConvertError(str(path), "no such file; a model folder has it beside the weights")
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConvertError(path.name, describe(error)[1].removeprefix(": ")) from error


def write_json(path: Path, content: JsonValue) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
