"""Validates the model card's ``[vllm]`` table."""

from collections.abc import Mapping
from typing import Literal

from pydantic import AliasChoices, Field, JsonValue, ValidationError, field_validator

from exo.worker.protocol.validation import describe
from exo.worker.runner_common.hf_embedding import Pooling
from exo.worker.runner_common.load_error import LoadError, from_library
from exo.worker.runner_common.model_files.adapter_folder import AdapterOptions
from exo.worker.runner_common.model_files.model_folder import FolderOptions


class VllmOptions(FolderOptions):
    """Keys of ``[vllm]``, named as vLLM names them, besides those of ``FolderOptions``.

    Counts are tokens unless said otherwise.
    """

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """The type of computed elements. The default is the stored type, but bfloat16 for float32."""
    quantization: str | None = None
    """vLLM's name of a method, such as "fp8". The default is the setting in the folder's config.json."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """The number of devices that share each layer."""
    pipeline_parallel_size: int = Field(default=1, ge=1, le=64)
    """The number of groups of devices that have some of the layers each."""
    max_model_len: int | None = Field(
        default=None, ge=256, le=1 << 24, validation_alias=AliasChoices("max_model_len", "n_ctx")
    )
    """The context length of each sequence, also accepted as ``n_ctx``, its name in other tables. "auto" is as much of
    the trained length as fits the memory. That is also the default, up to 32,768 on a CPU or with
    gpu_memory_utilization, and 2,048 for embeddings."""
    slots: int = Field(default=4, ge=1, le=1024)
    """Sequences generated at the same time."""
    contexts: int | None = Field(default=None, ge=1, le=1024)
    """The number of whole contexts, each ``max_model_len``, that the KV cache holds; all sequences share it. The
    default is as many as fit, up to ``slots``. With gpu_memory_utilization it has no effect."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1, strict=False)
    """The share of each GPU's memory that vLLM takes. The KV cache gets the rest of it."""
    max_num_batched_tokens: int | None = Field(default=None, ge=32, le=1 << 20)
    """The most prompt tokens per step, of all prompts together. The default is 2,048 on a GPU and 128 on a CPU. A text
    to embed is computed in one step, unless the vector of its last token stands for it."""
    enforce_eager: bool | None = None
    """Whether to use neither compilation nor CUDA graphs, which starts sooner and generates more slowly. The default is
    true on a CPU only."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of a CPU build. The default is one for each core."""
    lora: tuple[AdapterOptions, ...] = Field(default=(), strict=False)
    """Adapters in PEFT's format, of which each request may name one. vLLM computes all of them in one batch. A model on
    several devices has none."""
    pictures: bool = False
    """Whether prompts may have pictures. The model must see, and its folder have its processor's configuration. A model
    on several devices, or for embeddings, takes none."""
    pooling: Pooling | None = None
    """How the vectors of tokens become one vector of the text. The default is the setting in the folder's
    1_Pooling/config.json, or else "mean". Only for a card with the task TextEmbedding and without TextGeneration: vLLM
    loads a model for one of them."""

    @field_validator("max_model_len", mode="before")
    @classmethod
    def _auto_is_usual(cls, value: JsonValue) -> JsonValue:
        """Replaces "auto" by the default. A server that counts memory has put a number there."""
        return None if value == "auto" else value

    @property
    def processes(self) -> int:
        """The number of processes that share the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


def read_options(table: Mapping[str, JsonValue]) -> VllmOptions:
    """Validates the card's table. Raises LoadError with the key at fault."""
    try:
        return VllmOptions.model_validate(table)
    except ValidationError as error:
        raise LoadError("model_misconfigured", f"model card, [vllm] {describe(error)[1]}") from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the error means a lack of memory, for which vLLM has no class."""
    low = str(error).lower()
    signs = ("out of memory", "can't allocate", "no available memory for the cache", "free memory on device")
    return isinstance(error, MemoryError) or any(sign in low for sign in signs)


def load_error(what: str, error: BaseException) -> LoadError:
    """Makes a LoadError that quotes the library's error."""
    return from_library(what, error, out_of_memory=ran_out_of_memory(error))
