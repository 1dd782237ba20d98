"""Files that are something else than their names say are named for what they are, with the remedy."""

from pathlib import Path

import pytest

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.file_kind import incomplete, what_it_is
from exo.worker.runner_common.model_files.gguf import open_gguf
from exo.worker.runner_common.model_files.header_source import HeaderError
from exo.worker.runner_common.model_files.model_folder import FolderOptions, find_folder, read_folder
from exo.worker.runner_common.model_files.safetensors import open_safetensors
from exo.worker.runner_cuda.loading.options import CudaOptions, find_model
from tests.support.tiny import Shape, write_gguf, write_mlx

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
PAGE = b"\n<!DOCTYPE html><html><head>"
KINDS = {
    POINTER: "a Git LFS pointer, which stands for the file: run git lfs pull",
    PAGE: "a web page (HTML)",
    b"<?xml version='1.0'?><Error>": "an XML text",
    b"PK\x03\x04" + bytes(20): "a ZIP archive",
    b"tjgg" + bytes(20): "a GGML file from before GGUF",
    bytes(64): "a file of zeros",
}


@pytest.mark.parametrize("content", KINDS)
def test_weights_that_are_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(HeaderError, match="is not a GGUF file: it is ") as of_gguf:
        open_gguf(tmp_path / "file")
    with pytest.raises(HeaderError, match="is not a safetensors file: it is ") as of_safetensors:
        open_safetensors(tmp_path / "file")
    for refusal in (of_gguf, of_safetensors):
        assert KINDS[content] in str(refusal.value)


def test_each_format_in_the_place_of_the_other(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", Shape())
    write_mlx(tmp_path / "folder", Shape())
    with pytest.raises(HeaderError, match=r"it is a safetensors file, .*\[mlx\]"):
        open_gguf(tmp_path / "folder" / "model.safetensors")
    with pytest.raises(HeaderError, match=r"it is a GGUF file, .*\[cuda\]"):
        open_safetensors(tmp_path / "model.gguf")
    with pytest.raises(LoadError, match=r"model.gguf is a file, .* \[cuda\]"):
        find_folder(FolderOptions(path=str(tmp_path / "model.gguf")), "a/b", [])
    with pytest.raises(LoadError, match=r"folder is a folder, .* \[mlx\]"):
        find_model(CudaOptions(path=str(tmp_path / "folder")), "a/b", [])
    with pytest.raises(LoadError, match=r"name a file in it, such as model.gguf"):
        find_model(CudaOptions(path=str(tmp_path)), "a/b", [])
    with pytest.raises(LoadError, match=r"it is a folder of GGUF files, such as model.gguf: .*\[cuda\]"):
        read_folder(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [POINTER, PAGE])
def test_any_file_of_a_folder_may_be_something_else(tmp_path: Path, file: str, content: bytes) -> None:
    write_mlx(tmp_path, Shape())
    (tmp_path / file).write_bytes(content)
    with pytest.raises(LoadError) as refusal:
        read_folder(tmp_path)
    assert str(tmp_path / file) in str(refusal.value)
    assert KINDS[content] in str(refusal.value)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(LoadError, match=r"it is an adapter \(LoRA\) of org/base: merge it"):
        read_folder(tmp_path)
    write_mlx(tmp_path, Shape())
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(LoadError, match=r"has no tokenizer: tokenizer.json is missing"):
        read_folder(tmp_path)


def test_how_much_of_a_file_is_there(tmp_path: Path) -> None:
    assert incomplete(812_345_678, 4_680_123_456) == "is cut short: 812 of 4,681 MB are there; download it again"
    write_gguf(tmp_path / "whole.gguf", Shape())
    whole = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "part.gguf").write_bytes(whole[:-1000])
    with pytest.raises(
        HeaderError, match=f"cut short: {len(whole) - 1000:,} of {len(whole):,} bytes .*download it again"
    ):
        open_gguf(tmp_path / "part.gguf")


def test_an_unknown_beginning_is_nothing() -> None:
    assert what_it_is(b"anything else at all") is None
