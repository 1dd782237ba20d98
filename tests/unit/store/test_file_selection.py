"""Which of a repository's files a runner gets."""

import pytest

from exo.store.errors import PullError
from exo.store.file_selection import Source, select
from exo.worker.runner_common.model_files.folder_weights import INDEX
from tests.support.pulling import gguf_card, mlx_card

GGUFS = [
    "README.md",
    "model-Q4_K_M.gguf",
    "model-UD-Q4_K_XL.gguf",
    "model-q8_0.gguf",
    "model-IQ2_XXS.gguf",
    "BF16/model-BF16-00001-of-00002.gguf",
    "BF16/model-BF16-00002-of-00002.gguf",
    "Q2_K/model-00001-of-00001.gguf",
    "mmproj-F16.gguf",
    "mmproj-BF16.gguf",
    "imatrix_unsloth.gguf",
    "config.json",
]
LABELS = "BF16, Q2_K, IQ2_XXS, Q4_K_M, UD-Q4_K_XL, Q8_0"


def cuda(file: str, quant: str | None = None, mmproj: str | None = None) -> Source:
    return Source.of(gguf_card(file, **({"mmproj": mmproj} if mmproj else {})), "cuda", quant)


@pytest.mark.parametrize(
    ("file", "quant", "names"),
    [
        ("model-Q4_K_M.gguf", None, ("model-Q4_K_M.gguf",)),
        ("*Q4_K_M.gguf", None, ("model-Q4_K_M.gguf",)),
        ("*Q4_K_M.gguf", "q8_0", ("model-q8_0.gguf",)),
        ("*Q4_K_M.gguf", "UD-Q4_K_XL", ("model-UD-Q4_K_XL.gguf",)),
        ("BF16/*.gguf", None, ("BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf")),
        (
            "BF16/*-00001-of-*.gguf",
            None,
            ("BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf"),
        ),
        ("*Q4_K_M.gguf", "Q2_K", ("Q2_K/model-00001-of-00001.gguf",)),
    ],
)
def test_one_quantisation_with_all_its_parts(file: str, quant: str | None, names: tuple[str, ...]) -> None:
    assert select(cuda(file, quant), GGUFS).names == names


def test_a_projector_comes_only_with_a_card_that_names_it() -> None:
    assert select(cuda("*Q4_K_M.gguf", mmproj="mmproj-F16.gguf"), GGUFS).names == (
        "model-Q4_K_M.gguf",
        "mmproj-F16.gguf",
    )
    with pytest.raises(
        PullError, match=r"2 files that match mmproj = 'mmproj-\*'; .*mmproj-BF16.gguf, mmproj-F16.gguf"
    ):
        select(cuda("*Q4_K_M.gguf", mmproj="mmproj-*"), GGUFS)


@pytest.mark.parametrize(
    ("file", "quant"), [("*Q5_K_M.gguf", None), ("*Q4_K_M.gguf", "Q5_K_M"), ("x/*Q8_0.gguf", None)]
)
def test_where_nothing_fits_the_quantisations_are_listed(file: str, quant: str | None) -> None:
    with pytest.raises(PullError, match=rf"org/model has no GGUF file .*; it has {LABELS}$") as error:
        select(cuda(file, quant), GGUFS)
    assert error.value.code == "no_match"


def test_where_several_fit_none_is_taken() -> None:
    with pytest.raises(PullError, match=r"more than one GGUF file that matches.*: IQ2_XXS, Q4_K_M, UD-Q4_K_XL, Q8_0"):
        select(cuda("*.gguf"), GGUFS)
    with pytest.raises(PullError, match=r"more than one.*Q8_0: a-Q8_0.gguf, b-Q8_0.gguf"):
        select(cuda("*", "Q8_0"), ["a-Q8_0.gguf", "b-Q8_0.gguf"])


def test_a_split_file_without_all_its_parts_is_refused() -> None:
    with pytest.raises(PullError, match=r"not complete: m-00002-of-00003.gguf is not there"):
        select(cuda("m-00001-of-00003.gguf"), ["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"])


MLX = [
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
]
NOT_MLX = [
    ".gitattributes",
    "README.md",
    "consolidated.safetensors",
    "modeling_model.py",
    "onnx/model.onnx",
    "original/model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "weights.pt",
    "sub/config.json",
]


@pytest.mark.parametrize("runner", ["mlx", "vllm"])
def test_a_folder_is_weights_configuration_and_tokenizer_and_no_code(runner: str) -> None:
    chosen = select(Source.of(mlx_card(), runner), [*NOT_MLX, *MLX])
    assert sorted(chosen.names) == sorted(MLX)
    assert chosen.names[0] == "config.json"


def test_the_index_says_which_weights_are_pulled() -> None:
    names = ["config.json", "tokenizer.json", "a.safetensors", "b.safetensors", "model.safetensors", INDEX]
    chosen = select(Source.of(mlx_card(), "mlx"), names, ["a.safetensors", "b.safetensors"])
    assert set(chosen.names) == {*names} - {"model.safetensors"}
    with pytest.raises(PullError, match=r"c\.safetensors is not there"):
        select(Source.of(mlx_card(), "mlx"), names, ["a.safetensors", "c.safetensors"])


def test_an_adapter_is_told_from_a_model() -> None:
    with pytest.raises(PullError, match=r"is an adapter \(LoRA\) of another model"):
        select(Source.of(mlx_card(), "mlx"), ["adapter_config.json", "adapter_model.safetensors"])


def test_a_repository_that_is_no_folder_is_refused() -> None:
    with pytest.raises(
        PullError, match=r"has no model\*\.safetensors, so mlx cannot load it; pickles are never fetched"
    ):
        select(Source.of(mlx_card(), "mlx"), ["config.json", "pytorch_model.bin"])
    with pytest.raises(PullError, match=r"has no config\.json"):
        select(Source.of(mlx_card(), "mlx"), GGUFS[:-1])
    with pytest.raises(PullError, match=r"model-00002-of-00002\.safetensors is not there"):
        select(Source.of(mlx_card(), "mlx"), [name for name in MLX if "00002-of" not in name])


def test_a_card_without_a_repository_cannot_be_pulled() -> None:
    for table, reason in (({}, "names no repository"), ({"path": "x.gguf"}, "names the path x.gguf")):
        card = gguf_card("x").model_copy(update={"engines": {"cuda": table}})
        with pytest.raises(PullError, match=reason) as error:
            select(Source.of(card, "cuda"), GGUFS)
        assert error.value.code == "not_pullable"
    with pytest.raises(PullError, match="there is no runner nope"):
        Source.of(mlx_card(), "nope")
    with pytest.raises(PullError, match="a quantisation is chosen for cuda only"):
        Source.of(mlx_card(), "mlx", "Q4_K_M")
    with pytest.raises(PullError, match=r"\[cuda\] repo: .*\.\./x"):
        Source.of(gguf_card("x").model_copy(update={"engines": {"cuda": {"repo": "../x", "file": "x"}}}), "cuda")
