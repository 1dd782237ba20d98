"""Which files of a folder are its model's weights."""

import pytest

from exo.worker.runner_common.model_files.folder_weights import Weights, choose_weights, names_in_index

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
STRAY = "model-00003-of-00003.safetensors"
A, B = "llama-a.safetensors", "llama-b.safetensors"


@pytest.mark.parametrize(
    ("names", "indexed", "expected"),
    [
        ([TWO, ONE, STRAY, "model.safetensors"], [ONE, TWO], Weights((ONE, TWO), (), (STRAY, "model.safetensors"))),
        ([A, B, "config.json"], [A, B], Weights((A, B))),
        ([ONE], [ONE, TWO], Weights((ONE,), (TWO,))),
        (["model.safetensors", ONE, TWO], None, Weights(("model.safetensors",), (), (ONE, TWO))),
        ([ONE, TWO, "consolidated.safetensors"], None, Weights((ONE, TWO), (), ("consolidated.safetensors",))),
        ([ONE], None, Weights((ONE,), (TWO,))),
        ([ONE, TWO, STRAY], None, Weights((), (), (ONE, TWO, STRAY))),
        ([A, "adapters.safetensors"], None, Weights((A,), (), ("adapters.safetensors",))),
        (["adapter_model.safetensors"], None, Weights((), (), ("adapter_model.safetensors",))),
        ([A, B], None, Weights((), (), (A, B))),
    ],
)  # fmt: skip
def test_the_index_decides_else_the_names(names: list[str], indexed: list[str] | None, expected: Weights) -> None:
    assert choose_weights(names, indexed) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", "is no index of weights"),
        (b'{"weight_map": {"a": 1}}', "is no index of weights"),
        (b'{"weight_map": {"a": "../model.safetensors"}}', "which is no safetensors file of the folder itself"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', "which is no safetensors file of the folder itself"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        names_in_index(content)
