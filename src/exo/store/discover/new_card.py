"""Makes a model card of a model's own description."""

from collections.abc import Mapping

from pydantic import JsonValue

from exo.cards.card import ModelCard, SamplingDefaults, StorageSize
from exo.store.discover.description import Description
from exo.worker.protocol.runners import RUNNERS

_BACKENDS = ("MlxMetal", "Vllm", "MlxCuda", "MlxCpu")
"""The backends of a folder that the MLX and vLLM runners both load, each before the ones that are slower there."""


def gguf_tables(**keys: JsonValue) -> tuple[dict[str, dict[str, JsonValue]], tuple[str, ...]]:
    """The runners' tables for a GGUF file, each with these keys, and the backends, the preferred one first."""
    return {"cuda": keys}, RUNNERS["cuda"].backends


def folder_tables(
    description: Description, **keys: JsonValue
) -> tuple[dict[str, dict[str, JsonValue]], tuple[str, ...]]:
    """The same for a folder of safetensors."""
    backends = _BACKENDS if description.for_transformers else RUNNERS["mlx"].backends
    return {name: dict(keys) for name in ("mlx", "vllm") if set(RUNNERS[name].backends) & set(backends)}, backends


def new_card(
    model_id: str,
    description: Description,
    tables: Mapping[str, Mapping[str, JsonValue]],
    backends: tuple[str, ...],
    size: int,
    *,
    aliases: tuple[str, ...] = (),
    sampling: SamplingDefaults | None = None,
) -> ModelCard:
    """The card of a model of ``size`` bytes. Raises ValidationError for a name that cannot be a model id."""
    return ModelCard(
        model_id=model_id,
        aliases=aliases,
        backends=backends,
        storage_size=StorageSize(in_bytes=size),
        n_layers=description.n_layers,
        hidden_size=description.hidden_size,
        num_key_value_heads=description.num_key_value_heads,
        context_length=description.context_length,
        supports_tensor=False,
        tasks=(description.task,),
        family=description.architecture,
        quantization=description.quantization,
        base_model=description.name or model_id.rpartition("/")[2],
        capabilities=description.capabilities,
        sampling_defaults=sampling or SamplingDefaults(),
        is_custom=True,
        engines=tables,
    )
