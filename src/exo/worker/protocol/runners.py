"""The table of runners. Adding one is a folder beside this file and one line here.

A runner's name is the value of the model card's ``runner`` flag, the suffix ``@name`` in a request's ``model``, and
the name of its table in a model card.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Need = Literal["grammar", "logprobs", "embeddings", "rerank", "vision", "adapter_scales"]
"""A request's needs beyond plain generation. ``Capabilities`` has a field of the same name for each."""
Prefer = Literal["latency", "throughput"]
"""The aim of a choice between runners: each request's latency, or the tokens a second of all requests together."""


@dataclass(frozen=True, slots=True)
class RunnerSpec:
    """How to start a runner (``python -m module``), and the card backends it serves, by upstream's names.

    ``features`` are its abilities with a suitable model. They count until the model is loaded and ``Capabilities`` are
    known. No two runners serve the same backend.
    """

    module: str
    backends: tuple[str, ...]
    features: frozenset[Need] = frozenset()
    exclusive_tasks: frozenset[Need] = frozenset()
    """Features that need the model loaded in a mode of its own. A text-generation card cannot use them."""
    keys: Mapping[Need, str] = field(default_factory=dict[Need, str])
    """Keys of the card's table for the runner without which a model lacks a feature."""
    environment: str | None = None
    """The virtual environment of a runner whose library conflicts with the server's."""
    setup: str = ""
    """The command that makes the environment."""

    @property
    def interpreter(self) -> str:
        """The Python that runs it. It may not exist.

        An environment of a runner is beside the ``.venv`` of a checkout. Elsewhere it is inside the server's.
        """
        if self.environment is None:
            return sys.executable
        prefix = Path(sys.prefix)
        folder = prefix.with_name(self.environment) if prefix.name == ".venv" else prefix / self.environment
        return str(folder / "bin" / "python")

    @property
    def command(self) -> tuple[str, ...]:
        """The command line that starts it. In any locale, its libraries read and write UTF-8."""
        return (self.interpreter, "-X", "utf8", "-m", self.module)


RUNNERS: dict[str, RunnerSpec] = {
    "cuda": RunnerSpec(
        "exo.worker.runner_cuda",
        ("LlamaCppCuda", "LlamaCppVulkan", "LlamaCppCpu"),
        frozenset({"grammar", "logprobs", "embeddings", "rerank", "vision", "adapter_scales"}),
        keys={"vision": "mmproj", "adapter_scales": "lora"},
    ),
    "mlx": RunnerSpec(
        "exo.worker.runner_mlx", ("MlxMetal", "MlxCuda", "MlxCpu"), frozenset({"grammar", "logprobs", "embeddings"})
    ),
    "vllm": RunnerSpec(
        "exo.worker.runner_vllm",
        ("Vllm",),
        frozenset({"grammar", "logprobs", "embeddings", "vision"}),
        exclusive_tasks=frozenset({"embeddings"}),
        keys={"vision": "pictures"},
        environment=".venv-vllm",
        setup="exo setup vllm",
    ),
}


def runner_commands() -> dict[str, tuple[str, ...]]:
    """The command that starts each runner, by runner name."""
    return {name: spec.command for name, spec in RUNNERS.items()}
