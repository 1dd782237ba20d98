"""Model cards: one TOML file for each model. The format is a superset of upstream exo's, so every upstream card loads.

exo adds ``runner``, ``aliases``, ``tool_format``, ``pinned``, ``force_load``, ``ttl``, ``prefer``, two tasks and one
table for each runner, such as ``[cuda]``, which only that runner reads.
"""

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from exo.worker.protocol.runners import RUNNERS, Need, Prefer
from exo.worker.protocol.validation import describe

UPSTREAM_BACKENDS = ("MlxMetal", "MlxCpu", "MlxCuda", "Vllm")

_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
# An id becomes a directory name, so no segment is "." or "..". "@" is excluded because it precedes a runner's name.
ModelId = Annotated[str, Field(pattern=f"^{_SEGMENT}(/{_SEGMENT}){{0,3}}(:{_SEGMENT})?$", max_length=200)]
RepoId = Annotated[str, Field(pattern=f"^{_SEGMENT}(/{_SEGMENT})?$", max_length=200)]
Alias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._:-]*$", max_length=100)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Bytes = Annotated[int, Field(ge=0, le=1 << 60)]
Names = Annotated[tuple[str, ...], Field(strict=False)]

Task = Literal["TextGeneration", "TextToImage", "ImageToImage", "TextEmbedding", "TextRanking"]
# The names of ``exo.chat.output.registry``; a test compares the two.
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
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class CardError(ValueError):
    """A card is invalid. ``key`` is the dotted key at fault, or empty if the file as a whole is."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key
        self.reason = reason


class _CardTable(BaseModel):
    """A table of a card. Strings are not converted to numbers or flags, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class StorageSize(_CardTable):
    """The size of the weights on disk."""

    in_bytes: Bytes


class Component(_CardTable):
    """A part of an image model (upstream's key)."""

    component_name: str
    component_path: str
    storage_size: StorageSize
    n_layers: Count | None = None
    can_shard: bool
    safetensors_index_filename: str | None = None


class Vision(_CardTable):
    """The image encoder of a language model (upstream's key)."""

    image_token_id: Annotated[int, Field(ge=0)]
    model_type: str
    weights_repo: str = ""
    image_token: str | None = None
    processor_repo: str | None = None


class SamplingValues(_CardTable):
    """Default sampling parameters, with the bounds of ``SamplingParams``."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=None, ge=-100, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-100, le=100)


class SamplingDefaults(SamplingValues):
    """The sub-tables override the defaults for requests with and without thinking."""

    thinking: SamplingValues | None = None
    non_thinking: SamplingValues | None = None


class ModelCard(_CardTable):
    """A model, the backends that may serve it, and each runner's own table."""

    model_id: ModelId
    aliases: Annotated[tuple[Alias, ...], Field(strict=False)] = ()
    runner: str = "auto"
    backends: Names = Field(min_length=1)
    """In order of preference."""
    storage_size: StorageSize
    n_layers: Count
    hidden_size: Count
    num_key_value_heads: Count | None = None
    context_length: Annotated[int, Field(ge=0, le=1 << 31)] = 0
    """Tokens the model was trained for; 0 if unknown."""
    supports_tensor: bool
    tasks: Annotated[tuple[Task, ...], Field(strict=False)]
    family: str = ""
    quantization: str = ""
    base_model: str = ""
    capabilities: Names = ()
    """Upstream's terms for the model itself, such as "thinking". A runner reports its own in ``Ready``."""
    reasoning_dialect: str = "none"
    tool_format: ToolFormat = "auto"
    """How the model writes tool calls; "auto" detects it from the chat template."""
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    pinned: bool = False
    """Exempts the model from eviction and from ``ttl``."""
    force_load: bool = False
    """Loads the model also if its memory is estimated not to fit."""
    ttl: Annotated[float, Field(ge=0, le=1e9)] | Literal[-1] | None = None
    """Seconds an idle model stays loaded; -1 keeps it loaded, None takes the server's setting."""
    prefer: Prefer | None = None
    """How to choose between runners that have loaded the model. None takes the server's setting, whose default is the
    order of ``backends``."""
    hosts: Annotated[Names, Field(min_length=1)] | None = None
    """The hosts that may serve the model, in order of preference; "local" is this machine. None: all, it first."""
    replicas: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """The most instances, one on each host. Another one is loaded when no instance has a free slot."""
    divide: Literal["auto"] | Names = "auto"
    """The hosts among which the model is divided, besides this machine. "auto" takes those with an address if the model
    does not fit this machine alone; an empty list never divides it."""
    uses_cfg: bool = False
    trust_remote_code: bool = False
    """Upstream's key. It has no effect: exo never runs code that comes with weights."""
    is_custom: bool = False
    """Upstream sets this on cards that users added."""
    vision: Vision | None = None
    components: Annotated[tuple[Component, ...], Field(strict=False)] | None = None
    engines: Mapping[str, Mapping[str, JsonValue]] = {}
    """The runners' tables, unvalidated, by runner name: ``[cuda]`` in the file is ``engines["cuda"]``."""

    @classmethod
    def from_toml(cls, text: str) -> "ModelCard":
        """Parses a TOML document. Raises CardError."""
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
            keys = ", ".join(sorted(accepted))
            raise CardError(unknown[0], f"unknown key; accepted are {keys} and the tables {tables}")
        try:
            return cls.model_validate({**document, "engines": engines})
        except ValidationError as error:
            key, reason = describe(error)
            raise CardError(key.removeprefix("engines."), reason.removeprefix("engines.")) from error

    def to_toml(self) -> str:
        """The document that ``from_toml`` reads as this card. Keys with default values are left out."""
        fields = self.model_dump(mode="json", exclude_defaults=True, exclude={"engines"})
        tables: dict[str, Mapping[str, JsonValue]] = {
            key: value for key, value in fields.items() if isinstance(value, dict)
        }
        lines = list(_toml_pairs({key: value for key, value in fields.items() if key not in tables}))
        for name, table in (tables | dict(self.engines)).items():
            lines += ["", f"[{name}]", *_toml_pairs(table)]
        return "\n".join(lines) + "\n"

    def keep_seconds(self, default: float) -> float:
        """How long an idle model stays loaded; infinity if it is never unloaded."""
        if self.ttl is None:
            return default
        return math.inf if self.ttl < 0 else float(self.ttl)

    @property
    def needs(self) -> dict[Need, str]:
        """The needs of every request for this model, as ``router.route`` takes them; none if it generates text."""
        if "TextGeneration" in self.tasks:
            return {}
        if "TextEmbedding" in self.tasks:
            return {"embeddings": "model"}
        return {"rerank": "model"} if "TextRanking" in self.tasks else {}

    @property
    def runners(self) -> tuple[str, ...]:
        """The runners that may serve it, in the order of its back ends."""
        if self.runner != "auto":
            return (self.runner,)
        served = {backend: name for name, spec in RUNNERS.items() for backend in spec.backends}
        return tuple(dict.fromkeys(served[backend] for backend in self.backends if backend in served))

    @property
    def adapters(self) -> dict[str, tuple[str, ...]]:
        """The runners in whose tables each adapter is, by its name. The runners validate the tables."""
        found: dict[str, tuple[str, ...]] = {}
        for runner, table in self.engines.items():
            listed = table.get("lora")
            for each in listed if isinstance(listed, list) else ():
                name = each.get("name") if isinstance(each, dict) else None
                if isinstance(name, str):
                    found[name] = (*found.get(name, ()), runner)
        return found

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
            raise _rejected("each may be listed only once")
        spec = RUNNERS.get(info.data.get("runner", "auto"))
        if spec and not set(spec.backends) & set(backends):
            raise _rejected(f"runner {info.data['runner']} serves none of these; it serves", *spec.backends)
        return backends


def _rejected(reason: str, *accepted: str) -> PydanticCustomError:
    return PydanticCustomError("card", "{reason}", {"reason": f"{reason} {', '.join(accepted)}".rstrip()})


def _toml_pairs(table: Mapping[str, JsonValue]) -> Iterator[str]:
    for key, value in table.items():
        yield f"{key if _BARE_KEY.fullmatch(key) else _toml_string(key)} = {_toml_value(value)}"


def _toml_value(value: JsonValue) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _toml_string(value)
        case list():
            return f"[{', '.join(map(_toml_value, value))}]"
        case dict():
            return f"{{ {', '.join(_toml_pairs(value))} }}"
        case _:
            return repr(value)


def _toml_string(text: str) -> str:
    """A basic string. TOML 1.0 excludes only quotation marks, backslashes and control characters from it."""
    return '"' + "".join(f"\\u{ord(each):04x}" if each in '"\\\x7f' or each < " " else each for each in text) + '"'
