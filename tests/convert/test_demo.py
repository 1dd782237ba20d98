"""The real demo model, converted: llama.cpp on the GGUF file and mlx-lm on what was made of it agree about a text.

Slow by the standards of the other tests: MLX multiplies on one core here.
"""

import shutil
from pathlib import Path

import numpy as np

from exo.config import Settings
from exo.convert import convert
from tests.support.tiny.question import Question, ask
from tests.support.tiny.texts import log_softmax

FILE = Path("google--gemma-3-270m", "gemma-3-270m-q4_k_m.gguf")
BOS = 2

PARAGRAPH = (
    "The old lighthouse stood at the end of a narrow strip of land, and every evening its keeper climbed the stairs to "
    "light the lamp. Ships passed far out at sea, and their crews looked for the beam to tell how close they were to "
    "the rocks. When the keeper grew old, his daughter learned the work."
)
TEXTS = [
    PARAGRAPH,
    "Hello world",
    "  two spaces and   three\n\n\nnew lines\ttabs\t\t at the end ",
    "naïve café, 你好 и здравствуй 😀👩‍👩‍👧 \u0001 \u07ff \ua66e",
    "I'll say they're 1234 things; don't! aaaaaaaaaaaaaaa",
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "a<bos>b <unused5> [multimodal] <table><tr>x</tr></table>",
    "def f(x):\n    return x ** 2  # comment\r\n",
    "",
]


def test_the_demo_model_in_mlx(tmp_path: Path) -> None:
    source = Settings.load().models_directory / FILE
    assert source.is_file(), "make demo-model fetches the demo model"
    report = convert(source, tmp_path / "mlx", to="mlx", dtype="f32")
    assert (report.tensors, report.parameters) == (236, 268_098_176)
    asked: Question = {
        "gguf": str(source),
        "folder": str(tmp_path / "mlx"),
        "batches": [[BOS]],
        "greedy": 0,
        "texts": TEXTS,
        "llama_logits": str(tmp_path / "llama.npy"),
        "mlx_logits": str(tmp_path / "mlx.npy"),
    }
    [tokenized] = ask("llama_engine", [asked])
    tokens = tokenized["plain"][0]
    asked["batches"] = [[BOS, *tokens]]
    [llama], [mlx] = ask("llama_engine", [asked]), ask("mlx_engine", [asked])
    # A gigabyte that pytest would keep for several runs.
    shutil.rmtree(tmp_path / "mlx")
    assert llama["plain"] == mlx["plain"]
    assert llama["special"] == mlx["special"]
    by_llama, by_mlx = (mean_nll(tmp_path / name, tokens) for name in ("llama.npy", "mlx.npy"))
    assert 2 < by_llama < 4
    assert abs(by_mlx / by_llama - 1) <= 0.02


def mean_nll(logits: Path, tokens: list[int]) -> float:
    """Mean negative log-likelihood in nats of each token after those before it."""
    rows = log_softmax(np.load(logits)[:-1])
    return float(-rows[np.arange(len(tokens)), tokens].mean())
