"""The card's ``[mlx]`` table, validated by the runner that it is for."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator

from exo.worker.protocol.wire import describe
from exo.worker.runner_common.hf_embedding import Pooling
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_folder import FolderOptions


class MlxOptions(FolderOptions):
    """Keys of ``[mlx]``, besides those of ``FolderOptions``. Counts are tokens unless said otherwise."""

    n_ctx: int | None = Field(default=None, ge=256, le=1 << 24)
    """Context of each slot; by default what the model was trained with, at most 4,096. "auto": as much of what it was
    trained with as there is memory for."""
    slots: int = Field(default=4, ge=1, le=256)
    """Sequences generated at the same time. The KV cache holds ``slots`` times ``n_ctx``."""
    prefill_chunk: int | None = Field(default=None, ge=32, le=1 << 16)
    """Prompt tokens per step, over all prompts; by default 512 on a GPU and 32 on a CPU."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What the model computes in; by default what its file holds, except for quantised weights on a CPU: float32."""
    pooling: Pooling | None = None
    """How tokens' vectors become one of the text; by default as the folder's 1_Pooling/config.json says, else mean."""
    embedding_ctx: int | None = Field(default=None, ge=32, le=1 << 20)
    """The longest text to embed; by default what a slot holds, at most 2,048."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=16)
    """Processes that divide every layer between them, by its heads; on CUDA, each on a GPU of its own."""
    pipeline_parallel_size: int = Field(default=1, ge=1, le=16)
    """Processes that each have some of the layers; on CUDA, each on a GPU of its own. One of the two sizes is 1."""

    ignored_settings: tuple[str, ...] = Field(default=(), strict=False)
    """Keys of the folder's config.json that mlx-lm does not read, and that do not matter for this model."""

    @field_validator("n_ctx", mode="before")
    @classmethod
    def _auto_is_usual(cls, value: JsonValue) -> JsonValue:
        """Whoever has an account of memory puts a number there; for others the default will do."""
        return None if value == "auto" else value

    @model_validator(mode="after")
    def _is_divided_one_way(self) -> "MlxOptions":
        if self.tensor_parallel_size > 1 and self.pipeline_parallel_size > 1:
            raise ValueError("one of tensor_parallel_size and pipeline_parallel_size must be 1")
        return self


def read_options(table: Mapping[str, JsonValue]) -> MlxOptions:
    """The card's table, validated. Raises LoadError naming the key."""
    try:
        return MlxOptions.model_validate(table)
    except ValidationError as error:
        raise LoadError("model_misconfigured", f"model card, [mlx] {describe(error)[1]}") from error
