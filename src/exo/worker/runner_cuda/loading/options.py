"""Validates the model card's ``[cuda]`` table, and finds the model file that it names."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.model_name import ADAPTER_NAME, stays_inside

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
Pooling = Literal["mean", "cls", "last", "rank"]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Speculate = Literal["auto", "off"] | Annotated[int, Field(ge=1, le=16)]

AUTO = "auto"
"""The value of a key that leaves the setting to exo."""
CPU = "CPU"
"""The value in ``devices`` for using no device."""
SHORTEST_CONTEXT = 256
"""llama.cpp makes no shorter one, also for a model that was trained for less."""
PREFIX_CACHE = 4 << 30, 1 << 30, 256 << 20
"""The sizes of the prefix cache in RAM, in bytes, if the model card does not say one."""
PREFIX_CACHE_SHARE = 1 / 8
"""The share of this machine's RAM that it takes at most, unless it has the smallest size."""
AUTO_ROLLBACK = 4
"""See ``CudaOptions.rollback``."""
CPU_CHUNK, CPU_ALONE, CPU_BUDGET = 128, 512, 768
"""The most prompt tokens on a CPU: of one prompt beside streams, of one prompt alone, and of all prompts between two
decode steps. Steps are short, so that a cancelled prompt ends soon."""
GPU_CHUNK, GPU_BUDGET = 512, 2048
_OPEN = ("n_ctx", "n_gpu_layers", "cpu_moe", "cache_type_k", "cache_type_v")
"""The keys that may be "auto"."""
UNQUANTISED: tuple[CacheType, ...] = ("f32", "f16", "bf16")


class ModelFile(BaseModel):
    """The keys that name a GGUF."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str | None = None
    """A GGUF file. A relative path is searched in the models directories."""
    repo: str | None = None
    file: str | None = None
    """A file name or pattern inside ``repo``. For a split GGUF, the first part."""

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
    """Layers on the GPU, which is the first one that the model uses. -1 is all of them."""
    max_tokens: int = Field(default=8, ge=1, le=16)
    """The most tokens of a draft."""


class LoraOptions(ModelFile):
    """Keys of ``[[cuda.lora]]``: an adapter, which changes the model's weights for the requests that name it."""

    name: str = Field(pattern=ADAPTER_NAME)
    """A request's ``model`` is then the model's name, ":" and this."""
    scale: float = Field(default=1.0, allow_inf_nan=False, strict=False)
    """The factor of the change."""


class CudaOptions(ModelFile):
    """Keys of ``[cuda]``. Counts are tokens unless said otherwise."""

    mmproj: str | None = Field(default=None, min_length=1)
    """The projector, with which the model sees pictures: a file beside the model's, or a pattern that one file there
    matches. It is pulled with the model."""
    mmproj_offload: bool | None = None
    """Whether the projector is on the first device. None: if the model has enough room beside it."""
    n_gpu_layers: int = Field(default=-1, ge=-1)
    """Layers on the GPU. -1 is all of them. The default is "auto": all of them if they fit with a context of 32,768
    tokens, or else as many as do."""
    cpu_moe: int = Field(default=0, ge=0)
    """The experts of the first so many layers stay in RAM, while the rest of these layers is on the GPU. The default is
    "auto": as few as necessary for a context of 32,768 tokens, before whole layers stay in RAM."""
    n_ctx: int | None = Field(default=None, ge=SHORTEST_CONTEXT, le=1 << 24)
    """The context length of one request, which is that of each slot, or of the pool. "auto" is as much of the trained
    length as fits the memory. That is also the default, up to 32,768 tokens on a CPU and 131,072 on several GPUs."""
    slots: int = Field(default=4, ge=1, le=256)
    """Sequences generated at the same time. The default is as many as fit the memory with the longest context, up to 4,
    or 4 with a pool."""
    kv: Literal["split", "pool", "auto"] = "auto"
    """Whether each slot has a part of the KV cache with ``n_ctx`` tokens ("split"), or all slots share ``n_ctx`` tokens
    ("pool"), of which one request may use all while others are short. "auto" splits if at least two slots get the
    longest context that the memory has room for, or if the model card states both ``n_ctx`` and ``slots``; otherwise it
    makes a pool. Models with sliding windows, recurrent layers or sparse attention, a draft model and ``exact`` need
    "split"."""
    n_batch: int | None = Field(default=None, ge=32, le=1 << 16)
    """The most prompt tokens, of all prompts together, between two tokens of the running streams. The default is 2,048
    on a GPU and 768 on a CPU. ``max_itl_ms`` may lower it."""
    n_ubatch: int | None = Field(default=None, ge=32, le=1 << 16)
    """The most tokens of one prompt in a step. The default is 512, and on a CPU 128 beside running streams."""
    max_itl_ms: int | None = Field(default=None, ge=1, le=60_000)
    """The longest time between two tokens of a stream while prompts are computed, in milliseconds. The default is 100
    on a GPU and 260 on a CPU. The smallest chunk of a prompt (64 tokens) may take longer, and the first streams of a
    burst of short prompts may wait four times as long for their second tokens."""
    prefix_cache_bytes: int | None = Field(default=None, ge=0)
    """RAM for prefixes that are no longer in a slot, and for checkpoints of layers that forget. 0 keeps none. The
    default is the largest of ``PREFIX_CACHE`` that fits the memory."""
    prefix_disk_bytes: int | None = Field(default=None, ge=0)
    """Disk for prefixes, of all models together when this one writes. 0 writes and reads none. The default is 8 GiB, or
    a tenth of the free disk if that is less."""
    cache_reuse: int | None = Field(default=None, ge=32)
    """The fewest consecutive tokens of a cached prompt that are used again at another position, behind a line that has
    changed. Without it, only prefixes are. Keys are rotated to the new positions, but keys and values were computed
    with the old line in view, so the results are not those of the new prompt. It needs ``slots`` = 1, its default then,
    and full attention in every layer. Requests with a seed and replayed ones do without it."""
    swa_full: bool = False
    """Whether sliding-window layers keep the cells of the whole context instead of those in their window. It takes
    more memory, and every prefix of a prompt in a slot can then be used again without a checkpoint."""
    speculate: Speculate | None = None
    """The number of tokens to guess, from earlier text or with the draft model or the model's own head, and to verify
    in one step while no prompt is computed. "auto" chooses the fastest number from the measured times of steps and the
    share of right guesses. "off" guesses nothing and loads neither. The default is "auto" with a draft model, or with
    ``exact`` and a head; else "off".

    Each token is chosen as without a guess, but several rows at once are rounded a little differently from one, as
    prompts are. With quantised weights this can turn a choice between tokens that are nearly as good (the logits of a
    Q4_K_M model differed by up to 1.4, and 6 of 630 tokens turned), so it is off by default."""
    draft: DraftOptions | None = None
    lora: tuple[LoraOptions, ...] = Field(default=(), strict=False)
    """Adapters, of which each request may name one. Requests with the same one are computed together, and steps of
    different ones alternate. ``exact``, ``cache_reuse`` and the split modes "row" and "tensor" exclude them."""
    backend_sampling: Literal["auto", "on", "off"] = "off"
    """Whether the device that computes the logits returns only the largest ones, for requests that are greedy or have a
    ``top_k`` of up to about 250, without penalties, biases, log-probabilities and grammar. The tokens are the same.
    "auto" uses it with every layer on GPUs and without speculation, if a trial at loading shows that it is faster. It
    is "off" by default, because it has not run on a GPU yet."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads. The default is one for each core that this process may use, and fewer while other programs or
    models compute, if that is measured to be faster."""
    threads_batch: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads for prompts and for several sequences at a time. The default is ``threads`` if that is given, or else
    the number that is measured to be fastest, hyperthreads included."""
    exact: bool = False
    """Whether the results of a model on the CPU must not depend on other requests, the cuts of prompts or the prefix
    cache, to the last bit. Every row of a matrix product is then computed by the same kernel, however many rows there
    are, which makes long prompts slower. The default of both cache types is then "bf16": with "f16" or "f32" for both,
    flash attention has kernels of its own for a single sequence and for 64 rows and more."""
    flash_attn: Literal["auto", "on", "off"] = "auto"
    cache_type_k: CacheType = "f16"
    """The type of keys. "auto" here and for the values is "q8_0" where only that makes room for 32,768 tokens, and else
    "f16"."""
    cache_type_v: CacheType = "f16"
    devices: tuple[str, ...] | None = Field(default=None, strict=False, min_length=1)
    """The devices to use, by name, such as "CUDA1", in this order. The default is all GPUs; ["CPU"] uses none."""
    split_mode: Literal["none", "layer", "row", "tensor"] = "layer"
    """How several devices are used: only one of them ("none"), whole layers on each ("layer"), or a share of every
    layer on each ("tensor", or "row" by an older method)."""
    tensor_split: tuple[Share, ...] | None = Field(default=None, strict=False)
    """The proportions of the devices' shares. The default is the devices' memory, or equal shares with "tensor"."""
    main_gpu: int = Field(default=0, ge=0)
    """The index in ``devices`` of the one to use with ``split_mode`` "none"."""
    chat_template: str | None = None
    """Jinja source that replaces the file's own template."""
    pooling: Pooling | None = None
    """How the vectors of tokens become one vector of the text, or a score with "rank". The default is the file's
    setting, or else "mean"."""
    embedding_ctx: int | None = Field(default=None, ge=32, le=1 << 20)
    """The longest text to embed. The default is the context of a slot, or an encoder's trained length, up to 2,048."""

    _projector_stays_inside = field_validator("mmproj")(stays_inside)

    @property
    def prefix_caches(self) -> tuple[int, ...]:
        """``prefix_cache_bytes``, or the sizes among which the free memory decides, largest first."""
        if self.prefix_cache_bytes is not None:
            return (self.prefix_cache_bytes,)
        ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        least = PREFIX_CACHE[-1]
        return tuple(size for size in PREFIX_CACHE if size == least or size <= ram * PREFIX_CACHE_SHARE)

    @property
    def speculation(self) -> Speculate:
        """``speculate``, or its default."""
        return self.speculate or ("off" if self.draft is None else "auto")

    @property
    def rollback(self) -> int:
        """The most guesses that are verified at a time with layers that have a recurrent state.

        Each one takes the memory of another state, which can be a hundred MB.
        """
        if self.speculation == "off":
            return 0
        return AUTO_ROLLBACK if self.speculation == "auto" else self.speculation

    @model_validator(mode="before")
    @classmethod
    def _exact_has_cache_types(cls, table: dict[str, JsonValue]) -> dict[str, JsonValue]:
        return {"cache_type_k": "bf16", "cache_type_v": "bf16", **table} if table.get("exact") is True else table

    @model_validator(mode="before")
    @classmethod
    def _reuse_has_one_slot(cls, table: dict[str, JsonValue]) -> dict[str, JsonValue]:
        return {"slots": 1, **table} if table.get("cache_reuse") is not None else table

    @model_validator(mode="after")
    def _reuse_can_shift(self) -> Self:
        if self.cache_reuse is None:
            return self
        if self.exact:
            raise ValueError("cache_reuse changes results, which exact forbids")
        if self.slots != 1:
            raise ValueError(f"cache_reuse needs slots = 1, not {self.slots}")
        if self.cache_type_k not in UNQUANTISED:
            raise ValueError(
                f"cache_reuse needs a cache_type_k among {', '.join(UNQUANTISED)}, not {self.cache_type_k}"
            )
        return self

    @model_validator(mode="after")
    def _adapters_can_be_told_apart(self) -> Self:
        names = [each.name for each in self.lora]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"lora has two adapters with the name {twice[0]}")
        excluded = {"exact": self.exact, "cache_reuse": self.cache_reuse is not None}
        excluded[f'split_mode "{self.split_mode}"'] = self.split_mode in ("row", "tensor")
        for what, given in excluded.items():
            if self.lora and given:
                raise ValueError(f"lora and {what} exclude each other")
        return self

    @model_validator(mode="after")
    def _exact_attention_has_one_kernel(self) -> Self:
        if not self.exact:
            return self
        if self.flash_attn == "off":
            raise ValueError('exact needs flash_attn, which is "off"')
        if self.cache_type_k == self.cache_type_v and self.cache_type_k in ("f32", "f16"):
            raise ValueError(
                f'exact needs other cache types than "{self.cache_type_k}" for both: the default is "bf16"'
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _auto_is_usual(cls, table: dict[str, JsonValue]) -> dict[str, JsonValue]:
        """Leaves out keys that are "auto" and so have their default; ``estimate`` gives the values to choose from."""
        types = [table.get(key) == AUTO for key in ("cache_type_k", "cache_type_v")]
        if any(types) and not all(types):
            raise ValueError(f'cache_type_k and cache_type_v must both be "{AUTO}" or neither')
        if any(types) and (table.get("flash_attn") == "off" or table.get("split_mode") == "tensor"):
            raise ValueError(f'cache_type_k and cache_type_v cannot be "{AUTO}" without quantised types')
        return {key: value for key, value in table.items() if key not in _OPEN or value != AUTO}

    @field_validator("devices")
    @classmethod
    def _devices_differ(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and len(set(names)) < len(names):
            raise ValueError("must name each device once")
        if names is not None and CPU in names and len(names) > 1:
            raise ValueError(f'"{CPU}" means that no device is used, so it must be the only name')
        return names

    @model_validator(mode="after")
    def _splits_as_llama_cpp_can(self) -> "CudaOptions":
        """Checks llama.cpp's own rules, which it enforces only after loading the weights, or not at all."""
        if self.main_gpu and self.split_mode != "none":
            raise ValueError('main_gpu chooses a device only if split_mode is "none"')
        if self.tensor_split is not None and self.split_mode == "none":
            raise ValueError('tensor_split is for several devices, but split_mode "none" uses one')
        if self.tensor_split is not None and not any(self.tensor_split):
            raise ValueError("tensor_split must have a number above 0")
        if self.split_mode != "tensor":
            return self
        if self.cpu_moe:
            raise ValueError('cpu_moe keeps experts in RAM, which llama.cpp cannot do with split_mode "tensor"')
        if self.backend_sampling == "on":
            raise ValueError('backend_sampling is "on", which llama.cpp does not support with split_mode "tensor"')
        if self.flash_attn == "off":
            raise ValueError('split_mode "tensor" needs flash_attn, which is "off"')
        if not {self.cache_type_k, self.cache_type_v} <= set(UNQUANTISED):
            given = f"{self.cache_type_k} and {self.cache_type_v}"
            raise ValueError(f'split_mode "tensor" needs cache types among {", ".join(UNQUANTISED)}, not {given}')
        return self


@dataclass(frozen=True, slots=True)
class Chunks:
    """The most prompt tokens of a step: of one prompt beside streams, of one prompt alone, and of all prompts."""

    beside: int
    alone: int
    budget: int


def chunks(options: CudaOptions, *, on_gpu: bool) -> Chunks:
    """Returns the model card's sizes, or else the fastest ones measured on such a device."""
    beside = options.n_ubatch or (GPU_CHUNK if on_gpu else CPU_CHUNK)
    alone = options.n_ubatch or (GPU_CHUNK if on_gpu else CPU_ALONE)
    return Chunks(beside, alone, max(alone, options.n_batch or (GPU_BUDGET if on_gpu else CPU_BUDGET)))


def find_model(options: ModelFile, model_id: str, directories: Sequence[str]) -> Path:
    """Returns the GGUF to load. Raises LoadError, with the places searched, if there is none.

    A symbolic link is followed wherever it leads: only the owner of a models directory can create one there.
    """
    places = list(_places(options, model_id, directories))
    found = next((path for path in places if path.is_file()), None)
    if found is None and options.file is not None:
        found = next(iter(sorted(p for place in places for p in place.parent.glob(place.name) if p.is_file())), None)
    if found is None and (folder := next((path for path in places if path.is_dir()), None)) is not None:
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        remedy = f"name a file in it, such as {ggufs[0]}" if ggufs else "folders of safetensors are for [mlx] or [vllm]"
        raise LoadError("model_load_failed", f"{folder} is a folder, and [cuda] loads a GGUF file: {remedy}")
    if found is None:
        looked = ", ".join(str(place) for place in places)
        raise LoadError("model_not_found", f"no model file for {model_id}: looked for {looked}")
    return found


def find_projector(options: CudaOptions, model: Path) -> Path | None:
    """Returns the projector beside the model's file; None if the card names none. Raises LoadError.

    The model's file may be in a folder of its own below the one that has the projector.
    """
    if options.mmproj is None:
        return None
    folders = dict.fromkeys((model.parent, model.parent.parent))
    found = [each for folder in folders for each in sorted(folder.glob(options.mmproj)) if each.is_file()]
    if not found:
        message = f"model card, [cuda] mmproj: there is no projector {options.mmproj} beside {model}"
        raise LoadError("model_not_found", message)
    return found[0]


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
