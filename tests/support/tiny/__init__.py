"""Tiny random models for the tests: one set of weights, written for llama.cpp and for MLX."""

from tests.support.tiny.gguf_file import write_gguf
from tests.support.tiny.mlx_folder import write_mlx
from tests.support.tiny.scripted import write_scripted
from tests.support.tiny.shape import Shape

__all__ = ["Shape", "write_gguf", "write_mlx", "write_scripted"]
