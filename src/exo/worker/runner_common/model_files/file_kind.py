"""Recognises a file that was taken for a model or a part of one, and names the remedy."""

import re

_KINDS = (
    (rb"version https://git-lfs", "a Git LFS pointer, which stands for the file: run git lfs pull in its folder"),
    (rb"\s*(?i:<!doctype html|<html)", "a web page (HTML): download the file itself, by an address with /resolve/"),
    (rb"\s*<", "an XML text, as a server sends for an error: download the file again"),
    (rb"GGUF", "a GGUF file, which llama.cpp loads: name it as path or file in the model card's [cuda] table"),
    (rb".{6}\0\0\{\"", "a safetensors file, which MLX and vLLM load: name its folder in [mlx] or [vllm]"),
    (rb"(lmgg|tjgg|algg|fmgg)", "a GGML file from before GGUF, which no engine here reads: get the model as GGUF"),
    (rb"PK\x03\x04", "a ZIP archive or a PyTorch checkpoint: get the model as GGUF or as safetensors"),
    (rb"\x80[\x02-\x05]", "a pickle, which may run code and is never loaded: get the model as safetensors"),
    (rb"\0{16}", "a file of zeros, as a broken download leaves it: download it again"),
)
_MEGABYTE = 1_000_000


def what_it_is(data: bytes | bytearray) -> str | None:
    """A file by its first bytes, with the remedy, as the end of a sentence; None for one that nobody knows."""
    return next((kind for start, kind in _KINDS if re.match(start, data, re.DOTALL)), None)


def incomplete(size: int, total: int) -> str:
    """The predicate of a file of which ``size`` of ``total`` bytes are there."""
    if total < 10 * _MEGABYTE:
        return f"is cut short: {size:,} of {total:,} bytes are there; download it again"
    return f"is cut short: {size // _MEGABYTE:,} of {-(-total // _MEGABYTE):,} MB are there; download it again"
