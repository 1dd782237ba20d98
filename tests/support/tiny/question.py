"""A test's question to an engine about one tiny model, and the answer; both cross a process boundary as JSON."""

import json
import subprocess
import sys
from typing import Literal, TypedDict

from tests import ROOT


class Question(TypedDict):
    gguf: str
    folder: str
    batches: list[list[int]]
    """Token ids, fed batch after batch to one sequence."""
    greedy: int
    """How many tokens to feed after those, each the most probable one."""
    texts: list[str]
    """Texts to tokenize."""
    llama_logits: str
    """Where the engine saves the logits after every token, [tokens, vocabulary] float32; a path ending in .npy."""
    mlx_logits: str


class Answer(TypedDict):
    special: list[list[int]]
    """The tokens of each text; the texts of special tokens count as special tokens."""
    plain: list[list[int]]
    """The same, but those texts are ordinary text."""
    warnings: list[str]
    """Lines that the engine logged as a warning or an error."""


def ask(engine: Literal["llama_engine", "mlx_engine"], questions: list[Question]) -> list[Answer]:
    """Put all questions to one fresh process of `engine`. Raises RuntimeError with its error output if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.{engine}"],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{engine} ended with {done.returncode}: {done.stderr}")
    return json.loads(done.stdout)
