"""The card's ``[vllm]`` table, validated by the runner that it is for."""

from collections.abc import Mapping
from typing import Literal

from pydantic import AliasChoices, Field, JsonValue, ValidationError, field_validator

from exo.worker.protocol.wire import describe
from exo.worker.runner_common.hf_embedding import Pooling
from exo.worker.runner_common.load_error import LoadError, from_library
from exo.worker.runner_common.model_folder import FolderOptions


class VllmOptions(FolderOptions):
    """Keys of ``[vllm]``, named as vLLM names them, besides those of ``FolderOptions``.

    Counts are tokens unless said otherwise.
    """

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
    with, at most 4,096, or 2,048 of a text to embed. "auto": as much of what it was trained with as there is memory
    for."""
    slots: int = Field(default=4, ge=1, le=1024)
    """Sequences generated at the same time. Without gpu_memory_utilization the KV cache holds ``slots`` times
    ``max_model_len``."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1, strict=False)
    """Share of each GPU's memory that vLLM takes, the KV cache being whatever is left of it."""
    max_num_batched_tokens: int | None = Field(default=None, ge=32, le=1 << 20)
    """Prompt tokens per step, over all prompts; by default 2,048 on a GPU and 128 on a CPU. A text to embed is computed
    in one step, however long, unless its last token stands for it."""
    enforce_eager: bool | None = None
    """No compilation and no CUDA graphs, which starts sooner and generates more slowly; by default on a CPU only."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """On a CPU; by default as many as there are processors."""
    pooling: Pooling | None = None
    """How tokens' vectors become one of the text; by default as the folder's 1_Pooling/config.json says, else mean.
    Only for a card whose tasks have TextEmbedding and not TextGeneration: vLLM loads a model for one of them."""

    @field_validator("max_model_len", mode="before")
    @classmethod
    def _auto_is_usual(cls, value: JsonValue) -> JsonValue:
        """Whoever has an account of memory puts a number there; for others the default will do."""
        return None if value == "auto" else value

    @property
    def processes(self) -> int:
        """Over how many the model is spread."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


def read_options(table: Mapping[str, JsonValue]) -> VllmOptions:
    """The card's table, validated. Raises LoadError naming the key."""
    try:
        return VllmOptions.model_validate(table)
    except ValidationError as error:
        raise LoadError("model_misconfigured", f"model card, [vllm] {describe(error)[1]}") from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was missing."""
    low = str(error).lower()
    signs = ("out of memory", "can't allocate", "no available memory for the cache", "free memory on device")
    return isinstance(error, MemoryError) or any(sign in low for sign in signs)


def load_error(what: str, error: BaseException) -> LoadError:
    """With the library's own words."""
    return from_library(what, error, out_of_memory=ran_out_of_memory(error))
