"""Validates the model card's ``[mlx]`` table."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator

from exo.worker.protocol.validation import describe
from exo.worker.runner_common.hf_embedding import Pooling
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.adapter_folder import AdapterOptions
from exo.worker.runner_common.model_files.model_folder import FolderOptions


class MlxOptions(FolderOptions):
    """Keys of ``[mlx]``, besides those of ``FolderOptions``. Counts are tokens unless said otherwise."""

    n_ctx: int | None = Field(default=None, ge=256, le=1 << 24)
    """The context length of each slot. The default is the trained length, at most 4,096; "auto" is as much of the
    trained length as fits the memory."""
    slots: int = Field(default=4, ge=1, le=256)
    """Sequences generated at the same time. The KV cache holds ``slots`` times ``n_ctx``."""
    prefill_chunk: int | None = Field(default=None, ge=32, le=1 << 16)
    """The most prompt tokens per step, of all prompts together. The default is 512 on a GPU and 32 on a CPU."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """The type of computed elements. The default is the stored type, or float32 for quantised weights on a CPU."""
    lora: tuple[AdapterOptions, ...] = Field(default=(), strict=False)
    """Adapters in PEFT's format, of which each request may name one. They need a model in one process."""
    pooling: Pooling | None = None
    """How the vectors of tokens become one vector of the text. The default is the setting in the folder's
    1_Pooling/config.json, or else "mean"."""
    embedding_ctx: int | None = Field(default=None, ge=32, le=1 << 20)
    """The longest text to embed. The default is the context of a slot, at most 2,048."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=16)
    """The number of processes that divide every layer by its heads. On CUDA, each has a GPU of its own."""
    pipeline_parallel_size: int = Field(default=1, ge=1, le=16)
    """The number of processes that have some of the layers each. On CUDA, each has a GPU of its own. One of the two
    sizes must be 1."""
    ignored_settings: tuple[str, ...] = Field(default=(), strict=False)
    """Keys of the folder's config.json that mlx-lm does not read and that do not matter for this model."""

    @field_validator("n_ctx", mode="before")
    @classmethod
    def _auto_is_usual(cls, value: JsonValue) -> JsonValue:
        """Replaces "auto" by the default. A server that counts memory has put a number there."""
        return None if value == "auto" else value

    @model_validator(mode="after")
    def _adapts_one_process(self) -> "MlxOptions":
        if self.lora and self.tensor_parallel_size * self.pipeline_parallel_size > 1:
            raise ValueError("lora: adapters need a model that is in one process")
        return self

    @model_validator(mode="after")
    def _is_divided_one_way(self) -> "MlxOptions":
        if self.tensor_parallel_size > 1 and self.pipeline_parallel_size > 1:
            raise ValueError("one of tensor_parallel_size and pipeline_parallel_size must be 1")
        return self


def read_options(table: Mapping[str, JsonValue]) -> MlxOptions:
    """Validates the card's table. Raises LoadError with the key at fault."""
    try:
        return MlxOptions.model_validate(table)
    except ValidationError as error:
        raise LoadError("model_misconfigured", f"model card, [mlx] {describe(error)[1]}") from error
