"""The card's ``[cuda]`` table, validated by the runner that it is for, and the model file that it names."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator, model_validator

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_name import stays_inside

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
Pooling = Literal["mean", "cls", "last", "rank"]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Speculate = Literal["auto", "off"] | Annotated[int, Field(ge=1, le=16)]


CPU = "CPU"
"""What stands in ``devices`` for no device at all."""
UNQUANTISED: tuple[CacheType, ...] = ("f32", "f16", "bf16")


class ModelFile(BaseModel):
    """The keys that name a GGUF."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str | None = None
    """A GGUF file; a relative path is looked for in the models directories."""
    repo: str | None = None
    file: str | None = None
    """File name or pattern inside ``repo``; of a split GGUF, the first part."""

    _stays_inside = field_validator("path", "repo", "file")(stays_inside)

    @model_validator(mode="after")
    def _names_one_file(self) -> Self:
        if (self.path is None) == (self.file is None):
            raise ValueError("give either path, or repo and file")
        if self.file is not None and self.repo is None:
            raise ValueError("file needs repo")
        return self


class DraftOptions(ModelFile):
    """Keys of ``[cuda.draft]``: a small model with the same vocabulary, whose guesses the large one verifies."""

    n_gpu_layers: int = Field(default=-1, ge=-1)
    """Layers kept on the GPU, the first of those that the model uses; -1 is all of them."""
    max_tokens: int = Field(default=8, ge=1, le=16)
    """Of a draft."""


class CudaOptions(ModelFile):
    """Keys of ``[cuda]``. Counts are tokens unless said otherwise."""

    mmproj: str | None = None
    """The projector for images, pulled with the model. This runner reads text alone and leaves it where it is."""
    n_gpu_layers: int = Field(default=-1, ge=-1)
    """Layers kept on the GPU; -1 is all of them, "auto" as many as there is memory for."""
    n_ctx: int | None = Field(default=None, ge=256, le=1 << 24)
    """Context of each slot; by default what the model was trained with, at most 4,096. "auto": as much of what it was
    trained with as there is memory for."""
    slots: int = Field(default=4, ge=1, le=256)
    """Sequences generated at the same time. The KV cache holds ``slots`` times ``n_ctx``."""
    n_batch: int | None = Field(default=None, ge=32, le=1 << 16)
    """Prompt tokens between two tokens of the running streams, over all prompts; by default 2,048 on a GPU and 768 on
    a CPU, or fewer as ``max_itl_ms`` has it."""
    n_ubatch: int | None = Field(default=None, ge=32, le=1 << 16)
    """Prompt tokens of one prompt in a step, at most; by default 512, and on a CPU 128 next to running streams."""
    max_itl_ms: int | None = Field(default=None, ge=1, le=60_000)
    """Milliseconds from one token of the running streams to the next at most, where prompts are computed in between,
    as far as the least piece of a prompt (64 tokens) allows it; by default 100 on a GPU and 260 on a CPU. It holds from
    the first stream's first token on."""
    prefix_cache_bytes: int = Field(default=256 << 20, ge=0)
    """Of the host's memory, for prefixes that are in no slot any more; 0: none are kept."""
    speculate: Speculate | None = None
    """Tokens to guess, from earlier text or by the draft model, and verify in one step while no prompt is computed.
    "auto": as many as make it faster, by the time that steps take at this load and the share of guesses that is right;
    "off": none, and no draft model is loaded. By default "auto" with a draft model and "off" without. Each token is
    chosen as without a guess, but rounding of several rows at once differs a little from that of one, as it does
    between prompt and output. On quantised weights this can turn a choice between tokens that are nearly as good (a
    Q4_K_M model's logits were up to 1.4 apart, and 6 of 630 tokens turned), so it has to be asked for."""
    draft: DraftOptions | None = None
    """A draft model."""
    backend_sampling: Literal["auto", "on", "off"] = "off"
    """Whether the device that computes logits hands back only the largest ones, for requests that are greedy or have a
    ``top_k`` of up to about 250, and no penalties, biases, log-probabilities or grammar. The tokens are the same.
    "auto": with every layer on GPUs and no speculation, if that is found to be faster when the model is loaded. By
    default "off", since this has not run on a GPU yet."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of the CPU part. By default one for each core that this process may use, and fewer while other programs
    or other models compute, as far as that is measured to be faster."""
    threads_batch: int | None = Field(default=None, ge=1, le=1024)
    """Threads for prompts and for several sequences at a time; by default ``threads``, if that is given, or else as
    many as are measured to be fastest, hyperthreads included."""
    flash_attn: Literal["auto", "on", "off"] = "auto"
    cache_type_k: CacheType = "f16"
    cache_type_v: CacheType = "f16"
    devices: tuple[str, ...] | None = Field(default=None, strict=False, min_length=1)
    """The devices to use, by name, such as "CUDA1", in this order; by default all GPUs. ["CPU"]: none."""
    split_mode: Literal["none", "layer", "row", "tensor"] = "layer"
    """Of several devices: one of them, whole layers on each, or a share of every layer on each ("row", by an older
    method)."""
    tensor_split: tuple[Share, ...] | None = Field(default=None, strict=False)
    """How much goes on each device, in proportion to the others; by default as each has memory, of "tensor" as much on
    each."""
    main_gpu: int = Field(default=0, ge=0)
    """With ``split_mode`` "none", which of the devices is used, the first being 0."""
    chat_template: str | None = None
    """Jinja source that replaces the file's own template."""
    pooling: Pooling | None = None
    """How tokens' vectors become one of the text, or with "rank" a score; by default as the file says, else mean."""
    embedding_ctx: int | None = Field(default=None, ge=32, le=1 << 20)
    """The longest text to embed; by default what a slot holds or an encoder was trained with, at most 2,048."""

    @property
    def speculation(self) -> Speculate:
        """``speculate``, or what it is by default."""
        return self.speculate or ("off" if self.draft is None else "auto")

    @field_validator("n_ctx", "n_gpu_layers", mode="before")
    @classmethod
    def _auto_is_usual(cls, value: JsonValue, info: ValidationInfo) -> JsonValue:
        """Whoever has an account of memory puts a number there; for others the default will do."""
        return (-1 if info.field_name == "n_gpu_layers" else None) if value == "auto" else value

    @field_validator("devices")
    @classmethod
    def _devices_differ(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and len(set(names)) < len(names):
            raise ValueError("must name each device once")
        if names is not None and CPU in names and len(names) > 1:
            raise ValueError(f'"{CPU}" means no other device, so it has to be alone')
        return names

    @model_validator(mode="after")
    def _splits_as_llama_cpp_can(self) -> "CudaOptions":
        """Its own rules, of which it would speak only once the weights are loaded, or never."""
        if self.main_gpu and self.split_mode != "none":
            raise ValueError('main_gpu chooses a device only where split_mode is "none"')
        if self.tensor_split is not None and self.split_mode == "none":
            raise ValueError('tensor_split is of several devices, and split_mode "none" uses one')
        if self.tensor_split is not None and not any(self.tensor_split):
            raise ValueError("tensor_split must have a number above 0")
        if self.split_mode != "tensor":
            return self
        if self.backend_sampling == "on":
            raise ValueError('backend_sampling is "on", which llama.cpp does not do with split_mode "tensor"')
        if self.flash_attn == "off":
            raise ValueError('split_mode "tensor" needs flash_attn, which is "off"')
        if not {self.cache_type_k, self.cache_type_v} <= set(UNQUANTISED):
            given = f"{self.cache_type_k} and {self.cache_type_v}"
            raise ValueError(f'split_mode "tensor" needs cache types of {", ".join(UNQUANTISED)}, not {given}')
        return self


def find_model(options: ModelFile, model_id: str, directories: Sequence[str]) -> Path:
    """The GGUF to load. Raises LoadError where there is none, naming the places that were looked at.

    A symbolic link is followed wherever it leads: whoever can make one in a models directory owns what is there.
    """
    places = list(_places(options, model_id, directories))
    found = next((path for path in places if path.is_file()), None)
    if found is None and options.file is not None:
        found = next(iter(sorted(p for place in places for p in place.parent.glob(place.name) if p.is_file())), None)
    if found is None:
        looked = ", ".join(str(place) for place in places)
        raise LoadError("model_not_found", f"no model file for {model_id}: looked for {looked}")
    return found


def _places(options: ModelFile, model_id: str, directories: Sequence[str]) -> Iterator[Path]:
    if options.path is not None:
        path = Path(options.path).expanduser()
        if path.is_absolute():
            yield path
            return
    name = options.path or options.file or ""
    folders = [model_id.replace("/", "--"), *([options.repo.replace("/", "--")] if options.repo else [])]
    for directory in directories:
        for folder in (*folders, "."):
            yield Path(os.path.normpath(Path(directory) / folder / name))
