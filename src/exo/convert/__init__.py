"""Converts models between llama.cpp's GGUF and Hugging Face safetensors, the format that MLX loads.

Importing this package loads no library; ``convert`` imports them when it is called.
"""

from collections.abc import Callable
from pathlib import Path

from exo.convert.report import Bits, ConversionProgress, ConversionReport, ConvertError, Dtype, Format

__all__ = ["Bits", "ConversionProgress", "ConversionReport", "ConvertError", "Dtype", "Format", "convert"]


def convert(
    source: Path,
    target: Path,
    *,
    to: Format,
    dtype: Dtype = "bf16",
    bits: Bits | None = None,
    overwrite: bool = False,
    shard_bytes: int = 2 << 30,
    on_progress: Callable[[ConversionProgress], None] = lambda progress: None,
) -> ConversionReport:
    """Writes the model at ``source`` to ``target``, which appears whole or not at all.

    ``to="mlx"`` reads a GGUF file (any part of a split one) and makes a folder. ``dtype`` is f32, f16 or bf16. ``bits``
    also quantises the matrices, affine in groups of 64; ``dtype`` is then for scales, biases and norms. A weights file
    has at most ``shard_bytes``, unless a single tensor is larger. ``to="gguf"`` reads such a folder and makes one file,
    with the matrices in ``dtype`` and the vectors in f32.

    Raises ConvertError, naming the tensor, key or file, for a model that cannot be converted exactly up to ``dtype``'s
    precision, for a target that exists unless ``overwrite``, and for a full disk; OSError for other failures.
    """
    try:
        from exo.convert.conversion import gguf_to_mlx, safetensors_to_gguf
        from exo.convert.encoding import gguf_encoding, mlx_encoding
    except ImportError as error:
        raise ConvertError(str(error.name), "this package is needed: pip install 'exo[convert]'") from error

    if to == "mlx":
        return gguf_to_mlx(source, target, mlx_encoding(dtype, bits), overwrite, shard_bytes, on_progress)
    if to != "gguf":
        raise ConvertError("to", f"is {to!r}, expected mlx or gguf")
    if bits is not None:
        raise ConvertError("bits", f"{bits} is for MLX; a GGUF file is quantised by dtype='q8_0'")
    return safetensors_to_gguf(source, target, gguf_encoding(dtype), overwrite, on_progress)
