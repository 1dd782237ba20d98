"""Checks a GGUF file before llama.cpp opens it, in a sandbox.

llama.cpp trusts lengths and offsets in a file, so that wrong ones make it read and write foreign memory, and it aborts
its process for some values. This program follows every length before llama.cpp sees the file. It gets a ``path``, and
whether the file should be a ``projector``, and answers with the ``error``, which is empty if the file is sound. The
other files of a split model are checked too.
"""

import json
import math
from functools import lru_cache
from pathlib import Path

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.gguf import BOOL, STRING, UINT32, GgufHeader, open_gguf, split_parts
from exo.worker.runner_common.model_files.header_source import HeaderError
from exo.worker.runner_common.sandbox import Sandbox, SandboxError, SandboxLimits, serve

_LIMITS = SandboxLimits(seconds=60, address_space=2 << 30)
"""The time is for slow disks."""
_MOST_LAYERS = 512
_LONGEST_SIDE = 1 << 13
"""Pixels of a side of the picture that a projector computes."""
_MOST = {"embedding_length": 1 << 20, "feed_forward_length": 1 << 24, "expert_count": 512} | {
    f"attention.{name}": 1 << 16 for name in ("head_count", "head_count_kv", "key_length", "value_length")
}
"""The largest values with which llama.cpp does not abort its process, by key without the architecture's name."""
_EPSILONS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.group_norm_epsilon")
_ROPE_BASES = ("rope.freq_base", "rope.freq_base_swa")
_ROPE_SCALINGS = ("", "none", "linear", "yarn", "longrope")
_OTHER_TYPES = {
    "adapter": "an adapter (LoRA) of another model: name it in [[cuda.lora]] of that model's card",
    "controlvector": "a control vector of another model, which is not a model by itself",
    "imatrix": "an importance matrix, with which models are quantised: get the model itself",
    "mmproj": "a projector, the part of a model that sees pictures: get the model itself",
    "clip": "a projector, the part of a model that sees pictures: get the model itself",
}
"""By general.type or general.architecture."""
_PROJECTORS = frozenset({
    "adapter", "cogvlm", "deepseekocr", "deepseekocr2", "dots3note_v", "dots_ocr", "exaone4_5", "gemma3", "gemma3nv",
    "gemma4uv", "gemma4v", "glm4v", "glm5v", "granite4_vision", "idefics3", "internvl", "janus_pro", "kimik25",
    "kimivl", "ldp", "ldpv2", "lfm2", "lightonocr", "ling3vl", "llama4", "mimovl", "minicpmv4_6", "minimax_m3", "mlp",
    "muse-glimmer", "nemotron_v2_vl", "paddleocr", "phi4", "pixtral", "qwen2.5o", "qwen2.5vl_merger", "qwen2vl_merger",
    "qwen3vl_merger", "resampler", "step3vl", "yasa2", "youtuvl",
})  # fmt: skip
"""The types of projectors for pictures that the library in llama-cpp-python 0.3.36 can load."""
_DEPENDENT_PROJECTORS = {
    "deepseek4v": "make more or fewer tokens of a picture depending on the text before it",
    "hunyuanvl": "number the pictures of a prompt",
}
"""The types that the library has, too, but for which one picture alone does not become what it is in a prompt."""
_ADAPTER_TYPES = (0, 1, 8, 30)
"""F32, F16, Q8_0 and BF16."""
_NO_VOCABULARY = ("none", "no_vocab")
_SENTENCEPIECE = "llama"
"""The kind of tokenizer that spells text outside its vocabulary in bytes."""
_TOKENS = "tokenizer.ggml.tokens"
_SHOWN = 80


def check_header(path: Path) -> None:
    """Checks a file, and the other files of a split model, in the sandbox. Raises LoadError.

    Sound files are checked again only if they have changed, since a load follows an estimate.
    """
    _check_in_sandbox(path, tuple(map(_state, split_parts(path))), "model")


def check_projector(path: Path) -> None:
    """Does the same for a projector, the part of a model that sees pictures. Raises LoadError."""
    _check_in_sandbox(path, (_state(path),), "projector")


def check_adapter(path: Path) -> None:
    """Does the same for an adapter (LoRA) of a model. Raises LoadError."""
    _check_in_sandbox(path, (_state(path),), "adapter")


def _state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:  # the check reports it
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=32)
def _check_in_sandbox(path: Path, _states: tuple[tuple[int, ...], ...], kind: str) -> None:
    try:
        with Sandbox("exo.worker.runner_cuda.loading.gguf_check", _LIMITS) as sandbox:
            error = sandbox.ask({"path": str(path), "kind": kind})["error"]
    except SandboxError as failure:
        error = f"{path}: the check of its header {failure}"
    if error:
        raise LoadError("model_load_failed", error)


def read_headers(path: Path) -> list[GgufHeader]:
    """The headers of a checked model's files; the first has the metadata. Raises LoadError."""
    try:
        return [open_gguf(part) for part in split_parts(path)]
    except (HeaderError, OSError) as error:
        raise LoadError("model_load_failed", f"{path} cannot be loaded: it {error}") from error


def check_file(path: Path) -> None:
    """Checks one file. Raises HeaderError, and OSError if the file cannot be read."""
    header = open_gguf(path)
    _check_kind(path, header)
    _check_values(header)
    if "general.architecture" in header.fields:
        _check_hyperparameters(header, header.architecture)
    if (tokens := header.fields.get(_TOKENS)) is not None and tokens.kind == STRING and tokens.count is not None:
        _check_tokens(header)


def check_projector_file(path: Path) -> None:
    """Checks one file. Raises HeaderError, and OSError if the file cannot be read."""
    header = open_gguf(path)
    if header.text("general.architecture") != "clip" or not header.value("clip.has_vision_encoder"):
        raise HeaderError("is no projector for pictures")
    _check_values(header)
    kind = projector_kind(header)
    if (why := _DEPENDENT_PROJECTORS.get(kind)) is not None:
        raise HeaderError(f"is a projector of type {kind!r}: those {why}, which this runner cannot do")
    if kind not in _PROJECTORS:
        raise HeaderError(f"is a projector of type {ascii(kind)[:_SHOWN]}, which is unknown to this llama.cpp")
    sides = {key: header.integer(f"clip.vision.{key}", 0) for key in ("image_size", "patch_size")}
    for key, side in sides.items():
        if not 0 < side <= _LONGEST_SIDE:
            raise HeaderError(f"has clip.vision.{key} = {side}, expected 1 to {_LONGEST_SIDE}")
    if sides["patch_size"] > sides["image_size"]:
        raise HeaderError("has patches that are larger than the picture")
    heads, size = (header.integer(f"clip.vision.{key}", 0) for key in ("attention.head_count", "embedding_length"))
    if heads <= 0 or size <= 0 or size % heads:
        raise HeaderError(f"has {heads} attention heads for vectors of {size} numbers")
    if not 0 < header.integer("clip.vision.block_count", 0) <= _MOST_LAYERS:
        raise HeaderError(f"has a number of layers that is not in 1 to {_MOST_LAYERS}")


def projector_kind(header: GgufHeader) -> str:
    """Returns the type of a projector for pictures, as llama.cpp reads it; empty if none is stated."""
    return header.text("clip.projector_type") or header.text("clip.vision.projector_type")


def _check_values(header: GgufHeader) -> None:
    """Raises HeaderError for a flag or a number that ends llama.cpp's process."""
    for key, field in header.fields.items():
        if field.kind == BOOL:
            values = header.data[field.at : field.at + (1 if field.count is None else field.count)]
            if values.strip(b"\0\1"):
                raise HeaderError(f"has a flag in {key!r} that is neither 0 nor 1")
        elif field.kind == UINT32 and field.count is None:
            value, most = header.integer(key, 0), _MOST.get(key.partition(".")[2])
            if most is not None and value > most:
                raise HeaderError(f"has {key} = {value}, expected at most {most}")


def _check_kind(path: Path, header: GgufHeader) -> None:
    """Names a file that is no language model, or not the whole of one."""
    kind, architecture = header.text("general.type"), header.text("general.architecture")
    if (other := _OTHER_TYPES.get(kind) or _OTHER_TYPES.get(architecture)) is not None:
        raise HeaderError(f"is {other}")
    parts = header.integer("split.count", 1)
    if parts > 1 and split_parts(path) == [path]:
        number = header.integer("split.no", 0) + 1
        end = max((tensor.start + tensor.size for tensor in header.tensors), default=0)
        if number == 1 and path.stat().st_size > end + (64 << 10):
            raise HeaderError(f"is {parts} parts joined into one file, which only works with the parts as they were")
        name = f"-{number:05}-of-{parts:05}.gguf"
        raise HeaderError(
            f"is part {number} of {parts} of a model, all of which must be there and end in {name} and so on"
        )
    if not header.tensors and parts < 2 and architecture:
        raise HeaderError("is a vocabulary without weights, which generates nothing: get the model itself")
    if header.text("tokenizer.ggml.model") in _NO_VOCABULARY:
        raise HeaderError("has no vocabulary, and so no text can be made of its tokens")


def check_adapter_file(path: Path) -> None:
    """Checks one file. Raises HeaderError, and OSError if the file cannot be read."""
    header = open_gguf(path)
    if (kind := header.text("general.type")) != "adapter":
        raise HeaderError(f"is no adapter (LoRA): its general.type is {ascii(kind)[:_SHOWN]}")
    if (kind := header.text("adapter.type")) != "lora":
        raise HeaderError(f"has adapter.type = {ascii(kind)[:_SHOWN]}, expected 'lora'")
    alpha = header.value("adapter.lora.alpha")
    if alpha is not None and not (isinstance(alpha, float) and math.isfinite(alpha)):
        raise HeaderError(f"has adapter.lora.alpha = {ascii(alpha)[:_SHOWN]}, expected a number")
    if "adapter.alora.invocation_tokens" in header.fields:
        raise HeaderError("is an adapter that begins at certain tokens (aLoRA), which this runner cannot do")
    for tensor in header.tensors:
        if tensor.kind not in _ADAPTER_TYPES:
            raise HeaderError(f"has {tensor.name!r} of tensor type {tensor.kind}, expected F32, F16, BF16 or Q8_0")


def _check_hyperparameters(header: GgufHeader, arch: str) -> None:
    """Raises HeaderError for numbers that llama.cpp's assertions would reject while loading."""

    def number(key: str) -> int:
        return header.integer(f"{arch}.{key}", 0)

    layers = header.integer(f"{arch}.block_count", 1)
    if not 1 <= layers <= _MOST_LAYERS:
        raise HeaderError(f"has {arch}.block_count = {layers}, expected 1 to {_MOST_LAYERS}")
    for key in _EPSILONS:
        value = header.value(f"{arch}.{key}")
        if value is not None and not (isinstance(value, float) and 0 < value < math.inf):
            raise HeaderError(f"has {arch}.{key} = {value}, expected a positive number")
    for key in _ROPE_BASES:  # with others, every logit is NaN
        value = header.value(f"{arch}.{key}")
        if value is not None and not (isinstance(value, float) and 0 <= value < math.inf):
            raise HeaderError(f"has {arch}.{key} = {value}, expected a number from 0 on")
    experts, groups, groups_used = (number(f"expert_{key}") for key in ("count", "group_count", "group_used_count"))
    used = max(header.per_layer(f"{arch}.expert_used_count", layers, 0))
    heads = header.per_layer(f"{arch}.attention.head_count", layers, 0)
    kv_heads = header.per_layer(f"{arch}.attention.head_count_kv", layers, 0)
    routes = not (arch.startswith("hunyuan") and experts <= 1)  # there, a count of one means none
    scaling, ahead = header.text(f"{arch}.rope.scaling.type"), number("nextn_predict_layers")
    rules = (
        (ahead <= layers, f"nextn_predict_layers = {ahead}, which is more than all {layers} layers"),
        (used <= experts or not routes, f"expert_used_count = {used}, which is more than the {experts} experts"),
        (used > 0 or experts == 0, f"{experts} experts, of which expert_used_count = 0 are used"),
        (groups < max(1, experts) or not routes, f"expert_group_count = {groups} for {experts} experts"),
        (groups < 2 or experts % groups == 0, f"{experts} experts, which {groups} groups do not divide"),
        (groups < 2 or 0 < groups_used < groups, f"expert_group_used_count = {groups_used} of {groups} groups"),
        (
            all(kv == 0 or each % kv == 0 for each, kv in zip(heads, kv_heads, strict=True)),
            "attention.head_count, which attention.head_count_kv does not divide",
        ),
        (scaling in _ROPE_SCALINGS, f"rope.scaling.type = {ascii(scaling)[:_SHOWN]}, which is unknown to llama.cpp"),
    )
    for holds, fault in rules:
        if not holds:
            raise HeaderError(f"has {fault} ({arch})")
    if heads[0] > 0:
        usual = number("attention.key_length") or number("embedding_length") // heads[0]
        _check_rotation(header, arch, "", usual)
        _check_rotation(header, arch, "_swa", number("attention.key_length_swa") or usual)


def _check_rotation(header: GgufHeader, arch: str, suffix: str, head: int) -> None:
    """Raises HeaderError unless the rotated elements of a head, where they are stated, are pairs of its elements.

    llama.cpp never ends a step in which it rotates none.
    """
    key = f"{arch}.rope.dimension_count{suffix}"
    rotated = header.integer(key, head)
    if key in header.fields and not (0 < rotated <= head and rotated % 2 == 0):
        raise HeaderError(f"has {key} = {rotated}, expected an even number up to {head}, the size of a head")


def _check_tokens(header: GgufHeader) -> None:
    """Raises HeaderError for a vocabulary for which llama.cpp aborts, while it loads or at some text.

    Empty tokens may repeat: it numbers them.
    """
    numbers: dict[bytes, int] = {}
    for number, token in enumerate(header.strings(_TOKENS)):
        if token and (first := numbers.setdefault(token, number)) != number:
            shown = token[:_SHOWN].decode(errors="replace")
            raise HeaderError(f"has the token {shown!r} in {_TOKENS} twice, as numbers {first} and {number}")
    if header.text("tokenizer.ggml.model") == _SENTENCEPIECE:
        unspelt = next((byte for byte in range(256) if not {b"<0x%02X>" % byte, bytes([byte])} & numbers.keys()), None)
        if unspelt is not None:
            raise HeaderError(f"has no token for the byte {unspelt:#04x}, so that some texts would end llama.cpp")


_CHECKS = {"model": check_file, "projector": check_projector_file, "adapter": check_adapter_file}


def _check(request: bytes) -> dict[str, str]:
    asked = json.loads(request)
    check, given = _CHECKS[asked["kind"]], Path(asked["path"])
    for path in split_parts(given) if asked["kind"] == "model" else [given]:
        try:
            check(path)
        except HeaderError as error:
            return {"error": f"{path} cannot be loaded: it {error}"}
        except OSError as error:
            return {"error": f"{path} cannot be read: {error.strerror}"}
    return {"error": ""}


if __name__ == "__main__":
    serve(lambda _: _check, _LIMITS)
