"""The card's ``[mlx]`` table, validated by the runner that it is for, and the folder that it names."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from exo.worker.wire import describe

Pooling = Literal["mean", "cls", "last"]
LoadErrorCode = Literal["model_not_found", "model_load_failed", "out_of_memory"]


class LoadError(Exception):
    """The model cannot be loaded; ``code`` is one of ``messages.ErrorCode``."""

    def __init__(self, code: LoadErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: LoadErrorCode = code


class MlxOptions(BaseModel):
    """Keys of ``[mlx]``. Counts are tokens unless said otherwise. Without path and repo, the model id is the repo."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str | None = None
    """A folder with config.json and safetensors; a relative path is looked for in the models directories."""
    repo: str | None = None
    n_ctx: int | None = Field(default=None, ge=256, le=1 << 24)
    """Context of each slot; by default what the model was trained with, at most 4,096. "auto": as much of what it was
    trained with as there is memory for."""
    slots: int = Field(default=4, ge=1, le=256)
    """Sequences generated at the same time. The KV cache holds ``slots`` times ``n_ctx``."""
    prefill_chunk: int | None = Field(default=None, ge=32, le=1 << 16)
    """Prompt tokens per step, over all prompts; by default 512 on a GPU and 32 on a CPU."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What the model computes in; by default what its file holds, except for quantised weights on a CPU: float32."""
    chat_template: str | None = None
    """Jinja source that replaces the folder's own template."""
    pooling: Pooling | None = None
    """How tokens' vectors become one of the text; by default as the folder's 1_Pooling/config.json says, else mean."""
    embedding_ctx: int | None = Field(default=None, ge=32, le=1 << 20)
    """The longest text to embed; by default what a slot holds, at most 2,048."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=16)
    """Processes that divide every layer between them, by its heads; on CUDA, each on a GPU of its own."""
    pipeline_parallel_size: int = Field(default=1, ge=1, le=16)
    """Processes that each have some of the layers; on CUDA, each on a GPU of its own. One of the two sizes is 1."""

    @field_validator("n_ctx", mode="before")
    @classmethod
    def _auto_is_usual(cls, value: JsonValue) -> JsonValue:
        """Whoever has an account of memory puts a number there; for others the default will do."""
        return None if value == "auto" else value

    @field_validator("path", "repo")
    @classmethod
    def _stays_inside(cls, name: str | None, info: ValidationInfo) -> str | None:
        """Only a path that is absolute, which the card's author then means, leaves the models directories."""
        if name is not None and (".." in Path(name).parts or "\0" in name):
            raise ValueError("must not lead out of the models directories with '..'")
        if name is not None and info.field_name != "path" and Path(name).is_absolute():
            raise ValueError("must be a name, not an absolute path")
        return name

    @model_validator(mode="after")
    def _is_divided_one_way(self) -> "MlxOptions":
        if self.tensor_parallel_size > 1 and self.pipeline_parallel_size > 1:
            raise ValueError("one of tensor_parallel_size and pipeline_parallel_size must be 1")
        return self

    @model_validator(mode="after")
    def _names_one_folder(self) -> "MlxOptions":
        if self.path is not None and self.repo is not None:
            raise ValueError("give either path or repo")
        return self


def read_options(table: Mapping[str, JsonValue]) -> MlxOptions:
    """The card's table, validated. Raises LoadError naming the key."""
    try:
        return MlxOptions.model_validate(table)
    except ValidationError as error:
        raise LoadError("model_load_failed", f"model card, [mlx] {describe(error)[1]}") from error


def find_model(options: MlxOptions, model_id: str, directories: Sequence[str]) -> Path:
    """The folder to load. Raises LoadError with code ``model_not_found``, naming where it was looked for.

    A symbolic link is followed wherever it leads: whoever can make one in a models directory owns what is there.
    """
    places = list(_places(options, model_id, directories))
    found = next((path for path in places if path.is_dir()), None)
    if found is None:
        looked = ", ".join(str(place) for place in places) or "nowhere, as there is no models directory"
        raise LoadError("model_not_found", f"no model folder for {model_id}: looked for {looked}")
    return found


def _places(options: MlxOptions, model_id: str, directories: Sequence[str]) -> Iterator[Path]:
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
