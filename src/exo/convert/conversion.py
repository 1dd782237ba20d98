"""The two conversions: read all but the weights, refuse a model that does not fit, convert the weights row by row."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

from exo.convert.architectures import (
    OUTPUT,
    ROPE_FACTORS,
    Architecture,
    Change,
    Hyperparameters,
    Llama3Scaling,
    TensorPair,
    by_gguf_name,
    check_tensors,
    tensor_pairs,
)
from exo.convert.config_json import Config, read_config, write_config
from exo.convert.encoding import GgufEncoding, MlxEncoding, Stored
from exo.convert.gguf_file import GgufModel, MetadataReader, create_gguf
from exo.convert.gguf_metadata import read_sizes, rope_factors, write_sizes
from exo.convert.hf_folder import (
    SafetensorsModel,
    checked,
    create_safetensors,
    read_source,
    weight_file_names,
    write_index,
    write_json,
)
from exo.convert.report import ConversionProgress, ConversionReport, ConvertError
from exo.convert.staging import TensorFile, require_space, staged
from exo.convert.tensor_data import Array, Kind, to_gguf, to_hugging_face
from exo.convert.tokenizer import TokenizerData
from exo.convert.tokenizer_from_hf import read_tokenizer as tokenizer_of_folder
from exo.convert.tokenizer_gguf import read_tokenizer as tokenizer_of_gguf
from exo.convert.tokenizer_gguf import write_tokenizer
from exo.convert.tokenizer_to_hf import token_ids, tokenizer_config_json, tokenizer_json

_SPAN_BYTES = 64 << 20
"""The float32 numbers in memory at a time."""
_COMPUTED_BUFFER = ".self_attn.rotary_emb.inv_freq"
"""In old llama folders. A loader computes it from ``rope_theta``."""

OnProgress = Callable[[ConversionProgress], None]


def gguf_to_mlx(
    source: Path, target: Path, encoding: MlxEncoding, overwrite: bool, shard_bytes: int, on_progress: OnProgress
) -> ConversionReport:
    """See ``exo.convert.convert``."""
    model = GgufModel(source)
    architecture = by_gguf_name(model.metadata.text("general.architecture"))
    sizes = read_sizes(model, architecture)
    tokenizer = tokenizer_of_gguf(model.metadata)
    left_out = _unread(model.metadata, architecture)
    pairs = tensor_pairs(architecture, sizes)
    in_config = {ROPE_FACTORS} if isinstance(sizes.rope_scaling, Llama3Scaling) else set[str]()
    found = {name: shape for name, shape in model.shapes().items() if name not in in_config}
    check_tensors({pair.gguf: pair.shape for pair in pairs}, found, architecture.name)
    model.check_types()
    shards = list(_shards([(pair, encoding.stored(pair)) for pair in pairs], shard_bytes))
    total = sum(stored.byte_count for shard in shards for stored in shard.stored)
    weights = _WeightFiles(model, lambda pair: pair.gguf, to_hugging_face, encoding, sizes.head_dim, total, on_progress)
    with staged(source, target, "mlx", overwrite=overwrite) as folder:
        require_space(target, total)
        folder.mkdir()
        _write_configuration(folder, architecture, sizes, tokenizer, encoding)
        file_of: dict[str, str] = {}
        for name, shard in zip(weight_file_names(len(shards)), shards, strict=True):
            with create_safetensors(folder / name, shard.stored) as file:
                weights.write(shard.pairs, file)
            file_of |= {stored.name: name for stored in shard.stored}
        write_index(folder, file_of, total)
    return _report(target, architecture, pairs, total, left_out)


def safetensors_to_gguf(
    source: Path, target: Path, encoding: GgufEncoding, overwrite: bool, on_progress: OnProgress
) -> ConversionReport:
    """See ``exo.convert.convert``."""
    folder = read_source(source)
    config = checked(folder, Config)
    model = SafetensorsModel(folder, config.quantization)
    found = model.shapes()
    architecture, sizes = read_config(config, has_output=OUTPUT.hugging_face in found)
    if sizes.layers > len(found):
        raise ConvertError("config.json: num_hidden_layers", f"is {sizes.layers}, but there are {len(found)} tensors")
    tokenizer = tokenizer_of_folder(folder, config)
    pairs = tensor_pairs(architecture, sizes)
    repeated = _repeated(model, sizes)
    expected = {pair.hugging_face: pair.shape for pair in pairs}
    check_tensors(expected, {name: shape for name, shape in found.items() if name not in repeated}, config.model_type)
    stored = [each for pair in pairs for each in encoding.stored(pair)]
    metadata = {
        "general.type": "model",
        "general.name": source.resolve().name,
        "general.file_type": int(_file_type(encoding.kind)),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **write_sizes(architecture, sizes),
        **write_tokenizer(tokenizer.tokenizer),
    }
    extra = _rope_tensors(sizes)
    stored += [Stored(name, "F32", data.shape[1:], data.nbytes) for name, data in extra]
    total = sum(each.byte_count for each in stored)
    weights = _WeightFiles(model, lambda pair: pair.hugging_face, to_gguf, encoding, sizes.head_dim, total, on_progress)
    with staged(source, target, "gguf", overwrite=overwrite) as path:
        require_space(target, total)
        with create_gguf(path, architecture.name, metadata, stored) as file:
            for name, data in extra:
                file.append(name, data.view(np.uint8))
            weights.write(pairs, file)
    left_out = (*tokenizer.left_out, *config.left_out(), *repeated)
    return _report(target, architecture, pairs, total, left_out)


@dataclass(slots=True)
class _WeightFiles:
    """Converts the weights a span of rows at a time, and counts the target's bytes."""

    source: GgufModel | SafetensorsModel
    name_in_source: Callable[[TensorPair], str]
    change: Callable[[Array, Change, int], Array]
    encoding: GgufEncoding | MlxEncoding
    head_dim: int
    total_bytes: int
    on_progress: OnProgress
    done_bytes: int = field(default=0, init=False)

    def write(self, pairs: Iterable[TensorPair], file: TensorFile) -> None:
        for pair in pairs:
            name = self.name_in_source(pair)
            for start, stop in self._spans(pair):
                values = self.change(self.source.rows(name, start, stop), pair.change, self.head_dim)
                for stored, data in self.encoding.encode(pair, values):
                    file.append(stored, data)
                    self.done_bytes += data.nbytes
                self.on_progress(ConversionProgress(self.done_bytes, self.total_bytes, name))

    def _spans(self, pair: TensorPair) -> Iterator[tuple[int, int]]:
        """Spans of rows; whole heads if the rows of a head change places."""
        rows = pair.shape[0] if len(pair.shape) == 2 else 1
        step = max(1, _SPAN_BYTES // (4 * pair.shape[-1]))
        if pair.change == "rotary":
            step = max(1, step // self.head_dim) * self.head_dim
        for start in range(0, rows, step):
            yield start, min(start + step, rows)


@dataclass(frozen=True, slots=True)
class _Shard:
    """The content of one safetensors file."""

    pairs: list[TensorPair] = field(default_factory=list[TensorPair])
    stored: list[Stored] = field(default_factory=list[Stored])


def _shards(tensors: Iterable[tuple[TensorPair, list[Stored]]], limit: int) -> Iterator[_Shard]:
    """Files in order, each of at most ``limit`` bytes unless a single tensor is larger."""
    shard, size = _Shard(), 0
    for pair, stored in tensors:
        added = sum(each.byte_count for each in stored)
        if shard.pairs and size + added > limit:
            yield shard
            shard, size = _Shard(), 0
        shard.pairs.append(pair)
        shard.stored.extend(stored)
        size += added
    yield shard


def _unread(fields: MetadataReader, architecture: Architecture) -> tuple[str, ...]:
    """Metadata without a place in the target. Raises ConvertError for a key that may change the model's results."""
    fields.ignore("general.type", "general.file_type", "general.quantization_version")
    unread = fields.unread()
    for key in unread:
        # Other tokens' roles, such as for infilling, change nothing by themselves.
        names_a_role = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        if key.startswith((f"{architecture.name}.", "tokenizer.ggml.")) and not names_a_role:
            raise ConvertError(key, f"this metadata key is not known in a {architecture.name} model")
    return tuple(unread)


def _repeated(model: SafetensorsModel, sizes: Hyperparameters) -> list[str]:
    """Redundant tensors. Raises ConvertError for a tied output matrix that is not the embedding."""
    names = [name for name in model.shapes() if name.endswith(_COMPUTED_BUFFER)]
    output, embedding = OUTPUT.hugging_face, "model.embed_tokens.weight"
    if not sizes.tied or output not in model.shapes():
        return names
    rows = sizes.vocabulary
    step = max(1, _SPAN_BYTES // (4 * sizes.hidden))
    same = model.shapes()[output] == model.shapes().get(embedding) and all(
        np.array_equal(model.rows(output, start, start + step), model.rows(embedding, start, start + step))
        for start in range(0, rows, step)
    )
    if not same:
        raise ConvertError(output, f"differs from {embedding}, though config.json has tie_word_embeddings")
    return [*names, output]


def _rope_tensors(sizes: Hyperparameters) -> list[tuple[str, Array]]:
    """config.json's ``rope_scaling`` as the tensor, of one row, that a GGUF file has instead."""
    if not isinstance(sizes.rope_scaling, Llama3Scaling):
        return []
    return [(ROPE_FACTORS, rope_factors(sizes.rope_scaling, sizes.rope_base, sizes.head_dim)[np.newaxis])]


def _write_configuration(
    folder: Path, architecture: Architecture, sizes: Hyperparameters, tokenizer: TokenizerData, encoding: MlxEncoding
) -> None:
    ids = token_ids(tokenizer)
    write_json(folder / "config.json", write_config(architecture, sizes) | encoding.config() | ids)
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    write_json(folder / "tokenizer_config.json", tokenizer_config_json(tokenizer, sizes.context_length))


def _file_type(kind: Kind) -> gguf.LlamaFileType:
    return gguf.LlamaFileType["ALL_F32" if kind == Kind.F32 else f"MOSTLY_{kind.name}"]


def _report(
    target: Path, architecture: Architecture, pairs: Sequence[TensorPair], total: int, left_out: Sequence[str]
) -> ConversionReport:
    parameters = sum(math.prod(pair.shape) for pair in pairs)
    return ConversionReport(target, architecture.name, len(pairs), parameters, total, tuple(left_out))
