"""Refuses a setting in config.json that changes what a model computes and that mlx-lm does not read.

mlx-lm drops keys that its class for a model type does not have, and a class may have a key that its code never uses.
This module looks for the keys that mlx-lm reads in its classes and their source, so it follows the installed version.
"""

import ast
import inspect
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from typing import Protocol

from pydantic import JsonValue

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.folder_config import (
    FULL,
    Json,
    inexpressible,
    language_config,
    layer_types,
    normalised,
)
from exo.worker.runner_common.model_files.model_folder import HfFolder
from exo.worker.runner_mlx.loading.positions import SETTINGS, Rotation, WantedPositions, rotation

_MODELS = "mlx_lm.models."
_SHARED = ("base", "cache", "activations")
"""Modules of mlx-lm whose words say nothing about a model."""
_HARMLESS = re.compile(
    r"""
    _.* | architectures | auto_map | model_type | (torch_)?dtype | transformers_version | tokenizer_class | .*_name
    | use_cache | return_dict | output_.* | torchscript | use_bfloat16 | tf_.* | pruned_heads
    | is_(encoder_)?decoder | add_cross_attention | chunk_size_feed_forward | problem_type | task_specific_params
    | id2label | label2id | num_labels | finetuning_task | gradient_checkpointing | unsloth_.*
    | max_position_embeddings | n_positions | n_ctx | seq_length | max_seq_len | model_max_length | max_window_layers
    | .*_token_(id|ids|index) | .*dropout.* | .*_pdrop | .*init.* | .*loss.* | seq_aux | .*_bias
    | (vision|image|audio|video|mm|projector|projection|speech|vit)_.* | multimodal_.* | .*_per_image | use_.*_kernels?
    | pretraining_tp | num_nextn_predict_layers | (num_)?mtp_.* | ep_size | moe_capacity.* | quanti[sz].* | .*_config
    | merged_.* | spatial_.* | out_hidden_size | time_step_(min|max|floor) | .*_in_fp32 | use_flash_attn
    | cache_implementation | attn_implementation | summary_.* | router_jitter_noise
    """,
    re.X,
)
"""Keys about files, training, other tasks and parts that are not loaded, and biases, which are there or not: weights
that do not fit the class are an error. They do not change the next token."""
_ACTIVATION = re.compile(r"(mlp_)?hidden_act(ivation)?|activation_function|act_fn")
_OFF: tuple[JsonValue, ...] = (False, 0, "", [], {})
_WINDOW = ("sliding_window", "sliding_window_size", "use_sliding_window", "sliding_window_pattern", "layer_types")
_ALSO = {
    "experts_per_token": "num_experts_per_tok",
    "initial_context_length": "max_position_embeddings",
    "linear_head_dim": "head_dim",
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
}
"""Second names of settings."""
_PART = "partial_rotary_factor"
_NOT_COMPUTED = {"llama4_text": frozenset({"attention_chunk_size", "attn_temperature_tuning"})}
"""Settings by model type that transformers has by default and mlx-lm's class leaves out."""
_NEWER = frozenset({"rope_parameters", "layer_types"})
"""Keys of transformers 5. A class that reads one of them needs no older form."""
_ROPE = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"})
"""Keys of ``rope_scaling`` beside those of its type. Positions of pictures do not matter for text."""


class _ModelArguments(Protocol):
    def to_dict(self) -> Json: ...


class _ConfigClass(Protocol):
    """A class of transformers for the configurations of a kind of model."""

    def from_dict(self, config_dict: Json) -> _ModelArguments: ...


@dataclass(frozen=True, slots=True)
class ReadKeys:
    """What follows from a configuration whose settings are all read.

    ``window`` is the context in tokens up to which mlx-lm computes what the configuration says, None for any: it
    ignores some models' sliding windows. ``unread`` is the error for a setting of the positions that it does not read.
    """

    window: int | None
    unread: LoadError | None


def check_keys(folder: HfFolder, network: type, ignored: Collection[str]) -> ReadKeys:
    """Compares a configuration with what mlx-lm reads of it.

    ``network`` is its class for the model type, ``ignored`` are the names of settings that the model card declares
    harmless. Raises LoadError naming a setting that is not read, except one that ``wanted_positions`` includes.
    """
    sizes, written = language_config(folder.config), language_config(folder.written)
    words, defaults = _source(network.__module__)
    read = {key for key in sizes if key in defaults and key in words}
    read |= {key for key in sizes.keys() - written.keys() if read & _NEWER} | set(ignored)
    slides = sizes.get("use_sliding_window", not str(sizes["model_type"]).startswith("qwen"))
    window = _unread_window(sizes, read) if slides and "sliding_window" not in ignored else None
    beside = () if slides and window is None else _WINDOW
    skipped = {
        key: value
        for key, value in sizes.items()
        if not (key in read or value is None or _HARMLESS.fullmatch(key) or key in beside or _ALSO.get(key) in sizes)
    }
    assumed = _assumed(folder.config, skipped.keys() - _NOT_COMPUTED.get(str(sizes["model_type"]), frozenset()))
    replaced = _rotation(folder.config, 1) is not None and not SETTINGS & set(ignored)
    unread: LoadError | None = None
    for key, value in sorted(skipped.items()):
        usual = [each for each in (defaults.get(key), assumed.get(key)) if each is not None]
        if value not in (usual or _OFF) and not _is_computed(key, value, sizes, words):
            unread = _unread(key, value, folder)
            if not (replaced and key in SETTINGS):
                raise unread
    scaling = sizes.get("rope_scaling")
    for key, value in sorted(scaling.items() if isinstance(scaling, dict) and not replaced else ()):
        if value and key not in words and key not in _ROPE and f"rope_scaling.{key}" not in ignored:
            raise _unread(f"rope_scaling.{key}", value, folder)
    return ReadKeys(window, unread)


def wanted_positions(
    folder: HfFolder, unread: LoadError | None, n_ctx: int, ignored: Collection[str]
) -> WantedPositions | None:
    """Returns the rotation that the network must have for contexts of ``n_ctx`` tokens.

    Returns None if its layers differ, if the type of embeddings is not known here, or if the model card leaves a
    setting of them to mlx-lm.
    """
    found = None if SETTINGS & set(ignored) else _rotation(folder.config, n_ctx)
    if found is None:
        return None
    sizes = language_config(folder.config)
    key = "rope_scaling" if sizes.get("rope_scaling") else _PART
    refusal = unread or _unread(key, sizes.get(key), folder)
    return WantedPositions(found, unread is not None, refusal)


def _unread_window(sizes: Json, read: Collection[str]) -> int | None:
    """The tokens that a sliding window shows of a longer context, where mlx-lm shows all."""
    window, kind = sizes.get("sliding_window"), str(sizes["model_type"])
    every_layer = kind in ("mistral", "ministral3") and "layer_types" not in sizes  # there, mlx-lm has no window
    if "sliding_window" in read and not every_layer:
        return None
    types = sizes.get("layer_types")
    slides = not isinstance(types, list) or any(each != FULL for each in types)
    return window if isinstance(window, int) and slides else None


def _is_computed(key: str, value: JsonValue, sizes: Json, words: Collection[str]) -> bool:
    """Whether a setting that is not read says what mlx-lm computes anyway."""
    if _ACTIVATION.fullmatch(key) and isinstance(value, str):
        stem = value.removesuffix("_new").removesuffix("_fast").removesuffix("_pytorch_tanh").replace("swish", "silu")
        return any(stem in word for word in words) or (stem == "silu" and "swiglu" in words)
    if isinstance(value, str):
        return value in words or (key == "use_bidirectional_attention" and value == "vision")
    if key == "rope_parameters":
        return inexpressible(sizes) is None
    if key in ("num_key_value_heads", "head_dim"):
        heads, hidden = sizes.get("num_attention_heads"), sizes.get("hidden_size")
        usual = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None
        return "kv_lora_rank" in sizes or value == (heads if key == "num_key_value_heads" else usual)
    if key == _PART:
        return value == 1
    if key == "rope_local_base_freq":
        return value == sizes.get("rope_theta")
    if key == "layer_types" and isinstance(value, list):
        pattern = sizes.get("sliding_window_pattern")
        return value == layer_types(len(value), pattern if isinstance(pattern, int) and pattern > 0 else 1)
    return False


def _unread(key: str, value: JsonValue, folder: HfFolder) -> LoadError:
    what = f"{folder.path / 'config.json'} has {key} = {str(value)[:80]}"
    reason = f"which mlx-lm does not read for {folder.config['model_type']}, and so would compute another model"
    remedy = f"if it does not matter, say so in the model card: [mlx] ignored_settings = [{key!r}]"
    return LoadError("model_load_failed", f"{what}, {reason}; {remedy}")


def _rotation(config: Json, n_ctx: int) -> Rotation | None:
    sizes = language_config(config)
    defaults = _assumed(config, {_PART, "rope_parameters", "rope_scaling"})
    if sizes.get("rope_scaling") is None and sizes.get(_PART, 1) != 1 and _PART not in defaults:
        return None  # transformers itself rotates whole heads of this model type
    return rotation({**sizes, **_read_by_transformers(config, ())}, n_ctx)


def _assumed(config: Json, skipped: Collection[str]) -> Json:
    """Returns transformers' defaults of these keys; nothing for a model type that it does not know."""
    assumed = _read_by_transformers(config, skipped)
    return {key: assumed[key] for key in skipped if key in assumed}


def _read_by_transformers(config: Json, without: Collection[str]) -> Json:
    """Returns a configuration with transformers' defaults of what it does not say, or of the keys it is to be without.

    Returns nothing for a model type that transformers does not know.
    """
    known: Mapping[object, _ConfigClass] = import_module("transformers").CONFIG_MAPPING
    rest: Json = {
        key: value for key, value in language_config(config).items() if key not in without and value is not None
    }
    kind = next((kind for kind in (rest["model_type"], config["model_type"]) if kind in known), None)
    try:
        found = known[kind].from_dict(rest).to_dict() if kind is not None else {}
    except Exception:  # noqa: BLE001 -- every class checks values in its own way
        return {}
    return language_config(normalised(found))


@cache
def _source(name: str) -> tuple[frozenset[str], Json]:
    """Every word in the source of a module of mlx-lm and of its models that it uses; keys of configurations in them.

    The keys have their defaults, or None.
    """
    words, keys = set[str](), Json()
    seen, wanted = set[str](), [name]
    while wanted:
        module = sys.modules[each := wanted.pop()]
        if each in seen:
            continue
        seen.add(each)
        words |= _words(inspect.getsource(module))
        for value in vars(module).values():
            if is_dataclass(value) and getattr(value, "__module__", None) == each:
                keys |= {field.name: None if field.default is MISSING else field.default for field in fields(value)}
            other = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            if isinstance(other, str) and other.startswith(_MODELS) and other.removeprefix(_MODELS) not in _SHARED:
                wanted.append(other)
    return frozenset(words), keys


def _words(source: str) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=word) | ast.Name(id=word, ctx=ast.Load()) | ast.Constant(value=str(word)):
                found.add(word)
            case _:
                pass
    return found
