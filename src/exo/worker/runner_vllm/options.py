"""The card's ``[vllm]`` table, validated by the runner that it is for, and the folder that it names."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import (
    AliasChoices,
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

LoadErrorCode = Literal["model_not_found", "model_load_failed", "out_of_memory"]


class LoadError(Exception):
    """The model cannot be loaded; ``code`` is one of ``messages.ErrorCode``."""

    def __init__(self, code: LoadErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: LoadErrorCode = code


class VllmOptions(BaseModel):
    """Keys of ``[vllm]``, named as vLLM names them. Counts are tokens unless said otherwise.

    Without path and repo, the model id is the repo.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str | None = None
    """A folder with config.json and safetensors; a relative path is looked for in the models directories."""
    repo: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What the model computes in; by default what its file holds, which vLLM turns from float32 into bfloat16."""
    quantization: str | None = None
    """vLLM's name of a method, such as "fp8"; by default as the folder's config.json says."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """Devices that share each layer."""
    pipeline_parallel_size: int = Field(default=1, ge=1, le=64)
    """Groups of devices that have the layers one after another."""
    max_model_len: int | None = Field(
        default=None, ge=256, le=1 << 24, validation_alias=AliasChoices("max_model_len", "n_ctx")
    )
    """Context of each sequence, also as ``n_ctx``, its name in the other tables; by default what the model was trained
    with, at most 4,096. "auto": as much of what it was trained with as there is memory for."""
    slots: int = Field(default=4, ge=1, le=1024)
    """Sequences generated at the same time. Without gpu_memory_utilization the KV cache holds ``slots`` times
    ``max_model_len``."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1, strict=False)
    """Share of each GPU's memory that vLLM takes, the KV cache being whatever is left of it."""
    max_num_batched_tokens: int | None = Field(default=None, ge=32, le=1 << 20)
    """Prompt tokens per step, over all prompts; by default 2,048 on a GPU and 128 on a CPU."""
    enforce_eager: bool | None = None
    """No compilation and no CUDA graphs, which starts sooner and generates more slowly; by default on a CPU only."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """On a CPU; by default as many as there are processors."""
    chat_template: str | None = None
    """Jinja source that replaces the folder's own template."""

    @field_validator("max_model_len", mode="before")
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
    def _names_one_folder(self) -> "VllmOptions":
        if self.path is not None and self.repo is not None:
            raise ValueError("give either path or repo")
        return self

    @property
    def processes(self) -> int:
        """Over how many the model is spread."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


def read_options(table: Mapping[str, JsonValue]) -> VllmOptions:
    """The card's table, validated. Raises LoadError naming the key."""
    try:
        return VllmOptions.model_validate(table)
    except ValidationError as error:
        raise LoadError("model_load_failed", f"model card, [vllm] {describe(error)[1]}") from error


def find_model(options: VllmOptions, model_id: str, directories: Sequence[str]) -> Path:
    """The folder to load. Raises LoadError with code ``model_not_found``, naming where it was looked for.

    A symbolic link is followed wherever it leads: whoever can make one in a models directory owns what is there.
    """
    places = list(_places(options, model_id, directories))
    found = next((path for path in places if path.is_dir()), None)
    if found is None:
        looked = ", ".join(str(place) for place in places) or "nowhere, as there is no models directory"
        raise LoadError("model_not_found", f"no model folder for {model_id}: looked for {looked}")
    return found


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was missing."""
    low = str(error).lower()
    signs = ("out of memory", "can't allocate", "no available memory for the cache", "free memory on device")
    return isinstance(error, MemoryError) or any(sign in low for sign in signs)


def load_error(what: str, error: Exception) -> LoadError:
    """With the library's own words, shortened."""
    detail = " ".join(str(error).split())
    detail = f"{type(error).__name__}: {detail if len(detail) <= 400 else detail[:400] + '…'}"
    return LoadError("out_of_memory" if ran_out_of_memory(error) else "model_load_failed", f"{what}: {detail}")


def _places(options: VllmOptions, model_id: str, directories: Sequence[str]) -> Iterator[Path]:
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
