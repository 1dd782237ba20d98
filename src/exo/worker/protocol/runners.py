"""The table of runners. Adding one is a folder beside this file and one line here.

A runner's name is its value of the card's ``runner`` flag, the suffix ``@name`` in a request's ``model`` and the name
of its table in a model card.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Need = Literal["grammar", "logprobs", "embeddings", "rerank", "vision"]
"""What a request may need beyond plain generation; ``Capabilities`` has a field of the same name for each."""
Prefer = Literal["latency", "throughput"]
"""The aim of a choice between runners: each request's latency, or the tokens a second of all requests together."""


@dataclass(frozen=True, slots=True)
class RunnerSpec:
    """How to start a runner (``python -m module``) and which card backends it serves, named as upstream names them.

    ``features`` are what the runner can do with a suitable model. They answer for a model until it is loaded; then its
    ``Capabilities`` do. No two runners serve the same backend.
    """

    module: str
    backends: tuple[str, ...]
    features: frozenset[Need] = frozenset()
    exclusive_tasks: frozenset[Need] = frozenset()
    """Of ``features``, those for which a model is loaded exclusive_tasks: a card that is for generated text has them not."""
    environment: str | None = None
    """Of a runner whose library does not go together with the server's: the virtual environment that it runs in, a
    folder beside the one that exo itself runs in."""
    setup: str = ""
    """The command that makes the environment."""

    @property
    def interpreter(self) -> str:
        """The Python that runs it, whether it is there or not."""
        if self.environment is None:
            return sys.executable
        return str(Path(sys.prefix).with_name(self.environment) / "bin" / "python")

    @property
    def command(self) -> tuple[str, ...]:
        """The program that speaks the contract."""
        return (self.interpreter, "-m", self.module)


RUNNERS: dict[str, RunnerSpec] = {
    "cuda": RunnerSpec(
        "exo.worker.runner_cuda",
        ("LlamaCppCuda", "LlamaCppCpu"),
        frozenset({"grammar", "logprobs", "embeddings", "rerank"}),
    ),
    "mlx": RunnerSpec(
        "exo.worker.runner_mlx", ("MlxMetal", "MlxCuda", "MlxCpu"), frozenset({"grammar", "logprobs", "embeddings"})
    ),
    "vllm": RunnerSpec(
        "exo.worker.runner_vllm",
        ("Vllm",),
        frozenset({"grammar", "logprobs", "embeddings"}),
        exclusive_tasks=frozenset({"embeddings"}),
        environment=".venv-vllm",
        setup="make setup-vllm",
    ),
}
