"""Model cards: one TOML file for each model, a superset of upstream exo's, so that every card of upstream's loads.

Added here are ``runner``, ``aliases``, ``tool_format``, ``pinned``, ``ttl``, ``prefer``, two tasks and one table for
each runner, such as ``[cuda]``, which only that runner reads.
"""

import math
import tomllib
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from exo.worker.protocol.runners import RUNNERS, Prefer
from exo.worker.protocol.wire import describe

UPSTREAM_BACKENDS = ("MlxMetal", "MlxCpu", "MlxCuda", "Vllm")

_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
# No segment can be "." or "..", since an id becomes a directory's name; no "@", which precedes a runner's name.
ModelId = Annotated[str, Field(pattern=f"^{_SEGMENT}(/{_SEGMENT})?$", max_length=200)]
Alias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._:-]*$", max_length=100)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Bytes = Annotated[int, Field(ge=0, le=1 << 60)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


Task = Literal["TextGeneration", "TextToImage", "ImageToImage", "TextEmbedding", "TextRanking"]
"""Upstream's, and two that are added here: vectors of texts, and scores of documents for a query."""


ToolFormat = Literal[
    "auto",
    "none",
    "hermes",
    "qwen3-coder",
    "llama3",
    "mistral",
    "mistral-array",
    "gemma",
    "function-gemma",
    "gemma4",
    "deepseek-v3",
    "deepseek-v3.1",
    "glm",
    "kimi",
    "minimax",
    "harmony",
    "apertus",
    "apriel",
    "cohere",
    "command-r",
    "deepseek-v3.2",
    "deepseek-v4",
    "ernie",
    "function",
    "gigachat3",
    "gigachat3.1",
    "granite3",
    "hunyuan",
    "hunyuan3",
    "kimi-k3",
    "lfm2",
    "llama4",
    "longcat",
    "minicpm5",
    "minimax-m1",
    "minimax-m3",
    "nemotron",
    "olmo3",
    "pythonic",
    "seed",
    "tool-calls",
    "xlam",
]
"""Those of ``exo.chat.output.registry``, with which a test compares them."""


class CardError(ValueError):
    """A card that cannot be used: the ``key`` at fault, dotted and empty for the file as a whole, and the reason."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key
        self.reason = reason


class _Table(BaseModel):
    """A number is a number and a flag a flag: nothing is read out of strings. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class StorageSize(_Table):
    """Size of the weights on disk."""

    in_bytes: Bytes


class Component(_Table):
    """Upstream's: a part of an image model."""

    component_name: str
    component_path: str
    storage_size: StorageSize
    n_layers: Count | None = None
    can_shard: bool
    safetensors_index_filename: str | None = None


class Vision(_Table):
    """Upstream's: the image encoder beside a language model."""

    image_token_id: Annotated[int, Field(ge=0)]
    model_type: str
    weights_repo: str = ""
    image_token: str | None = None
    processor_repo: str | None = None


class SamplingValues(_Table):
    """Sampling parameters that apply where a request says nothing; bounds as in ``SamplingParams``."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=None, ge=-100, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-100, le=100)


class SamplingDefaults(SamplingValues):
    """The sub-tables hold whatever differs when a model thinks, or does not."""

    thinking: SamplingValues | None = None
    non_thinking: SamplingValues | None = None


class ModelCard(_Table):
    """One model: what it is, which backends may serve it, and each runner's own table."""

    model_id: ModelId
    aliases: Annotated[tuple[Alias, ...], Field(strict=False)] = ()
    """Short names by which a request may ask for the model."""
    runner: str = "auto"
    """The one runner to use, or "auto"."""
    backends: Names = Field(min_length=1)
    """Backends that may serve the model, the preferred one first."""
    storage_size: StorageSize
    n_layers: Count
    hidden_size: Count
    num_key_value_heads: Count | None = None
    context_length: Annotated[int, Field(ge=0, le=1 << 31)] = 0
    """Tokens that the model was trained for; 0 where unknown."""
    supports_tensor: bool
    tasks: Annotated[tuple[Task, ...], Field(strict=False)]
    family: str = ""
    quantization: str = ""
    base_model: str = ""
    capabilities: Names = ()
    """Upstream's words for the model itself, such as "thinking"; what a runner can do is in ``messages``."""
    reasoning_dialect: str = "none"
    tool_format: ToolFormat = "auto"
    """How the model writes calls of tools; "auto": as its chat template gives away."""
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    pinned: bool = False
    """Never unloaded to make room for another model, nor after a time."""
    ttl: Annotated[float, Field(ge=0, le=1e9)] | Literal[-1] | None = None
    """Seconds that the model stays loaded without being used; -1 is for ever, None what the server is set to."""
    prefer: Prefer | None = None
    """What decides between runners that have loaded the model; None is what the server is set to, by default the
    order of ``backends``."""
    uses_cfg: bool = False
    trust_remote_code: bool = False
    """Upstream's default is true; here code that comes with weights is never run unasked."""
    is_custom: bool = False
    """Upstream marks the cards that its users added."""
    vision: Vision | None = None
    components: Annotated[tuple[Component, ...], Field(strict=False)] | None = None
    engines: Mapping[str, Mapping[str, JsonValue]] = {}
    """The runners' tables by runner name, unread: ``[cuda]`` in the file is ``engines["cuda"]`` here."""

    @classmethod
    def from_toml(cls, text: str) -> "ModelCard":
        """The card in a TOML document. Raises CardError."""
        try:
            document = tomllib.loads(text)
        except ValueError as error:  # TOMLDecodeError, or an integer with too many digits
            raise CardError("", f"not TOML: {error}") from error
        except RecursionError as error:
            raise CardError("", "not TOML: nested too deeply") from error
        engines = {name: document.pop(name) for name in RUNNERS if name in document}
        accepted = cls.model_fields.keys() - {"engines"}
        if unknown := sorted(document.keys() - accepted):
            tables = ", ".join(f"[{name}]" for name in RUNNERS)
            raise CardError(
                unknown[0], f"unknown key; accepted are {', '.join(sorted(accepted))} and the tables {tables}"
            )
        try:
            return cls.model_validate({**document, "engines": engines})
        except ValidationError as error:
            key, reason = describe(error)
            raise CardError(key.removeprefix("engines."), reason.removeprefix("engines.")) from error

    def keep_seconds(self, usual: float) -> float:
        """How long the model stays loaded without being used; infinity for ever."""
        if self.ttl is None:
            return usual
        return math.inf if self.ttl < 0 else float(self.ttl)

    @field_validator("runner")
    @classmethod
    def _runner_is_known(cls, runner: str) -> str:
        if runner != "auto" and runner not in RUNNERS:
            raise _rejected("there is no such runner; accepted are", "auto", *RUNNERS)
        return runner

    @field_validator("backends")
    @classmethod
    def _backends_are_known(cls, backends: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        known = [*(name for spec in RUNNERS.values() for name in spec.backends), *UPSTREAM_BACKENDS]
        if not set(backends) <= set(known):
            raise _rejected("not all of these are known; accepted are", *dict.fromkeys(known))
        if len(set(backends)) < len(backends):
            raise _rejected("each may be listed once, at its place of preference")
        spec = RUNNERS.get(info.data.get("runner", "auto"))
        if spec and not set(spec.backends) & set(backends):
            raise _rejected(f"runner {info.data['runner']} serves none of these; it serves", *spec.backends)
        return backends


def _rejected(reason: str, *accepted: str) -> PydanticCustomError:
    return PydanticCustomError("card", "{reason}", {"reason": f"{reason} {', '.join(accepted)}".rstrip()})
