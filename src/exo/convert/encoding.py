"""How the target stores a tensor: the stored tensors it becomes, and their bytes."""

from collections.abc import Iterable
from dataclasses import dataclass

import gguf
from pydantic import JsonValue

from exo.convert.architectures import TensorPair
from exo.convert.mlx_quantisation import GROUP_SIZE, quantise, require_mlx
from exo.convert.report import Bits, ConvertError
from exo.convert.tensor_data import Array, Bytes, Kind, check_range, encode


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the target file. ``dtype`` is the format's name of its number type; a vector is one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    row_bytes: int

    @property
    def byte_count(self) -> int:
        return self.row_bytes * (self.shape[0] if len(self.shape) == 2 else 1)


def placed(tensors: Iterable[Stored], start: int, alignment: int = 1) -> dict[str, tuple[int, int]]:
    """Each tensor's first byte and the byte after its last, if they follow each other from ``start``."""
    places: dict[str, tuple[int, int]] = {}
    for tensor in tensors:
        end = start + tensor.byte_count
        places[tensor.name] = start, end
        start = -(-end // alignment) * alignment
    return places


@dataclass(frozen=True, slots=True)
class MlxEncoding:
    """Stores everything as ``kind`` or, with ``bits``, matrices in MLX's affine quantisation."""

    kind: Kind
    bits: Bits | None

    def config(self) -> dict[str, JsonValue]:
        """Keys of config.json."""
        names = {Kind.F32: "float32", Kind.F16: "float16", Kind.BF16: "bfloat16"}
        config: dict[str, JsonValue] = {"torch_dtype": names[self.kind]}
        if self.bits is not None:
            # mlx-lm writes both names too; the second is Hugging Face's.
            settings: JsonValue = {"group_size": GROUP_SIZE, "bits": self.bits, "mode": "affine"}
            config |= {"quantization": settings, "quantization_config": settings}
        return config

    def stored(self, pair: TensorPair) -> list[Stored]:
        """Raises ConvertError naming a matrix that cannot be quantised."""
        if self.bits is None or len(pair.shape) == 1:
            return [_plain(pair.hugging_face, pair.shape, self.kind)]
        rows, columns = pair.shape
        if columns % GROUP_SIZE:
            raise ConvertError(pair.hugging_face, f"has rows of {columns}, but MLX quantises groups of {GROUP_SIZE}")
        packed = (rows, columns * self.bits // 32)
        weight, scales, biases = _triple(pair.hugging_face)
        groups = (rows, columns // GROUP_SIZE)
        return [
            Stored(weight, "U32", packed, packed[1] * 4),
            _plain(scales, groups, self.kind),
            _plain(biases, groups, self.kind),
        ]

    def encode(self, pair: TensorPair, values: Array) -> list[tuple[str, Bytes]]:
        """Rows of ``pair`` by the names of ``stored``."""
        if self.bits is None or len(pair.shape) == 1:
            return [(pair.hugging_face, encode(values, self.kind, pair.hugging_face))]
        check_range(values, self.kind, pair.hugging_face)
        return list(zip(_triple(pair.hugging_face), quantise(values, self.bits, self.kind), strict=True))


@dataclass(frozen=True, slots=True)
class GgufEncoding:
    """Stores matrices as ``kind`` and vectors as float32, which llama.cpp requires."""

    kind: Kind

    def stored(self, pair: TensorPair) -> list[Stored]:
        """Raises ConvertError naming a matrix that cannot be quantised."""
        kind = self._kind(pair)
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if pair.shape[-1] % block:
            raise ConvertError(pair.gguf, f"has rows of {pair.shape[-1]}, but {kind.name} needs blocks of {block}")
        return [_plain(pair.gguf, pair.shape, kind)]

    def encode(self, pair: TensorPair, values: Array) -> list[tuple[str, Bytes]]:
        """Rows of ``pair`` by the name of ``stored``."""
        return [(pair.gguf, encode(values, self._kind(pair), pair.gguf))]

    def _kind(self, pair: TensorPair) -> Kind:
        return Kind.F32 if len(pair.shape) == 1 else self.kind


_MLX_KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16}
_GGUF_KINDS = _MLX_KINDS | {"q8_0": Kind.Q8_0}


def mlx_encoding(dtype: str, bits: Bits | None) -> MlxEncoding:
    """Raises ConvertError."""
    if bits not in (None, 4, 8):
        raise ConvertError("bits", f"is {bits}, expected 4 or 8")
    if bits is not None:
        require_mlx()
    return MlxEncoding(_kind(_MLX_KINDS, dtype), bits)


def gguf_encoding(dtype: str) -> GgufEncoding:
    """Raises ConvertError."""
    return GgufEncoding(_kind(_GGUF_KINDS, dtype))


def _kind(kinds: dict[str, Kind], dtype: str) -> Kind:
    if dtype not in kinds:
        raise ConvertError("dtype", f"is {dtype!r}, expected one of {', '.join(kinds)}")
    return kinds[dtype]


def _plain(name: str, shape: tuple[int, ...], kind: Kind) -> Stored:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return Stored(name, kind.name, shape, shape[-1] // block * size)


def _triple(weight: str) -> tuple[str, str, str]:
    module = weight.removesuffix(".weight")
    return weight, f"{module}.scales", f"{module}.biases"
