"""Writes a GGUF of any architecture that llama.cpp knows, with zeros as weights, from its metadata alone.

Run as a program, it prints the tensors that llama.cpp wants for the metadata of a file: a failed assertion of llama.cpp
then ends only that process.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from exo.convert.gguf_file import MetadataValue, add_value
from tests.support.tiny.tokenizer import Tokenizer

_SHAPE_OFFSET = 16
"""Bytes before the dimensions in ``struct ggml_tensor``."""
_DIMENSIONS = 4


def write_any(path: Path, architecture: str, keys: Mapping[str, MetadataValue]) -> None:
    """Writes a loadable file. ``keys`` are the architecture's own, without its name in front."""
    metadata = path.with_suffix(".metadata")
    _write(metadata, architecture, keys, {})
    command = [sys.executable, "-m", "tests.support.any_gguf", str(metadata)]
    env = os.environ | {"GGML_NO_BACKTRACE": "1"}
    found = subprocess.run(command, capture_output=True, check=False, text=True, env=env)
    assert found.returncode == 0, found.stderr
    # Scales of quantised matrices are optional, and llama.cpp does not accept those of layers that it skips.
    tensors = {name: shape for name, shape in json.loads(found.stdout).items() if not name.endswith("scale")}
    _write(path, architecture, keys, tensors)


def _write(path: Path, architecture: str, keys: Mapping[str, MetadataValue], tensors: Mapping[str, list[int]]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add_value(writer, f"{architecture}.{key}", value)
    tokenizer = Tokenizer.of_size(320)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token.text for token in tokenizer.tokens])
    writer.add_token_merges([f"{left} {right}" for left, right in tokenizer.merges])
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape[::-1], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _wanted(metadata: str) -> dict[str, list[int]]:
    """Returns the shapes of the tensors that llama.cpp creates for a model, innermost dimension first."""

    class Parameters(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mtp = True
    base = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib/libggml-base.so"))
    base.gguf_init_from_file.restype = ctypes.c_void_p
    base.gguf_init_from_file.argtypes = (ctypes.c_char_p, Parameters)
    base.ggml_get_name.restype = ctypes.c_char_p
    base.ggml_get_name.argtypes = (ctypes.c_void_p,)
    shapes = dict[str, list[int]]()

    def see(tensor: int, _: object) -> None:
        shape = (ctypes.c_int64 * _DIMENSIONS).from_address(tensor + _SHAPE_OFFSET)
        shapes[base.ggml_get_name(tensor).decode()] = list(shape)

    context = base.gguf_init_from_file(metadata.encode(), Parameters(no_alloc=True, ctx=None))
    callback = llama_cpp.llama_model_set_tensor_data_t(see)
    # The bindings do not type the callback.
    make = llama_cpp.llama_model_init_from_user  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    assert make(context, callback, ctypes.c_void_p(0), params), "llama.cpp made no model"
    return shapes


if __name__ == "__main__":
    print(json.dumps(_wanted(sys.argv[1])))
