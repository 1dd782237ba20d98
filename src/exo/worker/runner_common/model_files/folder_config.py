"""One reading of config.json: what newer and older versions of transformers write, under the keys that engines read.

Transformers 5 keeps the settings of rotary embeddings in ``rope_parameters``, for some models once for each kind of
layer. Older versions, MLX and most of its models have ``rope_theta``, ``rope_scaling`` and others beside them.
"""

import math
from collections.abc import Mapping

from pydantic import JsonValue

Json = dict[str, JsonValue]

FULL, SLIDING = "full_attention", "sliding_attention"
_BESIDE = ("rope_theta", "partial_rotary_factor")
"""Keys of ``rope_parameters`` that older configurations have at the top."""
_RENAMED = {"su": "longrope"}
_EXPERTS = ("num_experts", "num_local_experts")
"""Two names of one setting. Transformers 5 writes the second for models whose older folders have the first."""

_COUNTS = {
    "num_hidden_layers": (1, 10_000), "hidden_size": (1, 1 << 24), "vocab_size": (1, 1 << 28),
    "num_attention_heads": (0, 1 << 16), "num_key_value_heads": (0, 1 << 16), "head_dim": (0, 1 << 16),
}  # fmt: skip
"""The least and the most that these can be, which any network keeps."""
_CONSTANTS = ("rms_norm_eps", "layer_norm_eps", "rope_theta")
_OBJECTS = ("rope_scaling", "rope_parameters", "text_config", "quantization", "quantization_config")


def wrong_setting(config: Mapping[str, JsonValue]) -> str | None:
    """Returns a setting that no network can have, such as ``head_dim = '64', expected …``, if there is one.

    Lists, which have a value for each layer, and null are left to the library that knows the architecture.
    """
    for key in _OBJECTS:
        if not isinstance(config.get(key), dict | None):
            return f"{key} = {config[key]!r}, expected an object"
    found = language_config(dict(config))
    for key, (least, most) in _COUNTS.items():
        value = found.get(key)
        number = value if isinstance(value, int) and not isinstance(value, bool) else -1
        by_layer = isinstance(value, list) and key != "num_hidden_layers"
        if value is not None and not by_layer and not least <= number <= most:
            return f"{key} = {value!r}, expected a whole number from {least} to {most}"
    for key in _CONSTANTS:
        value = found.get(key)
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1
        if value is not None and not 0 <= number < math.inf:
            return f"{key} = {value!r}, expected a number from 0 on"
    return None


def normalised(config: Mapping[str, JsonValue]) -> Json:
    """The configuration with both forms of every setting. Where they contradict each other, transformers' choice wins.

    The language model of a configuration with a vision part is in ``text_config``, which is treated alike.
    """
    found = _both_forms(config)
    inner = found.get("text_config")
    return {**found, "text_config": _both_forms(inner)} if isinstance(inner, dict) else found


def language_config(config: Json) -> Json:
    """The configuration with the language model's sizes at the top; models with a vision part nest them."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def inexpressible(config: Mapping[str, JsonValue]) -> str | None:
    """A part of ``rope_parameters`` that the older keys cannot express, if there is one."""
    for kind, part in _by_layer_type(config.get("rope_parameters")).items():
        scaled = kind == SLIDING and _rope_type(part) != "default"
        if kind not in (FULL, SLIDING) or scaled:
            return f"rope_parameters.{kind}"
    return None


def sliding_pattern(config: Mapping[str, JsonValue]) -> int | None:
    """The number n where every n-th layer sees the whole context and the others a window; None for any other order."""
    types = config.get("layer_types")
    if not isinstance(types, list) or FULL not in types:
        return None
    pattern = types.index(FULL) + 1
    return pattern if types == layer_types(len(types), pattern) else None


def layer_types(count: int, pattern: int) -> list[JsonValue]:
    """Returns the list that transformers writes for ``count`` layers if every ``pattern``-th sees the whole context."""
    return [SLIDING if (layer + 1) % pattern else FULL for layer in range(count)]


def _both_forms(config: Mapping[str, JsonValue]) -> Json:
    found = dict(config)
    if (experts := next((found[key] for key in _EXPERTS if key in found), None)) is not None:
        found = dict.fromkeys(_EXPERTS, experts) | found
    if "sliding_window_pattern" not in found and (pattern := sliding_pattern(found)) is not None and pattern > 1:
        found["sliding_window_pattern"] = pattern
    rope = found.get("rope_scaling") or found.get("rope_parameters")
    if not isinstance(rope, dict):
        if "rope_theta" in found:
            found["rope_parameters"] = {"rope_type": "default", **_present(found, _BESIDE)}
        return found
    by_layer = _by_layer_type(rope)
    whole = by_layer.get(FULL, {}) if by_layer else rope
    found |= _present(whole, _BESIDE)
    if "rope_theta" in (local := by_layer.get(SLIDING, {})):
        found["rope_local_base_freq"] = local["rope_theta"]
    scaling: Json = {key: value for key, value in whole.items() if key not in _BESIDE and value is not None}
    kind = _rope_type(whole)
    plain = kind == "default" and not scaling.keys() - {"type", "rope_type"}
    found["rope_scaling"] = None if plain else {**scaling, "type": kind, "rope_type": kind}
    if not by_layer:
        found["rope_parameters"] = {**scaling, "rope_type": kind, **_present(found, _BESIDE)}
    return found


def _rope_type(rope: Mapping[str, JsonValue]) -> JsonValue:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return _RENAMED.get(kind, kind) if isinstance(kind, str) else kind


def _by_layer_type(rope: JsonValue) -> dict[str, Json]:
    return {key: value for key, value in rope.items() if isinstance(value, dict)} if isinstance(rope, dict) else {}


def _present(config: Mapping[str, JsonValue], keys: tuple[str, ...]) -> Json:
    return {key: config[key] for key in keys if config.get(key) is not None}
