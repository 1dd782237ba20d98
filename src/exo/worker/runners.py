"""The table of runners. Adding one is a folder beside this file and one line here.

A runner's name is its value of the card's ``runner`` flag, the suffix ``@name`` in a request's ``model`` and the name
of its table in a model card.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunnerSpec:
    """How to start a runner (``python -m module``) and which card backends it serves, named as upstream names them."""

    module: str
    backends: tuple[str, ...]


RUNNERS: dict[str, RunnerSpec] = {
    "cuda": RunnerSpec("exo.worker.runner_cuda", ("LlamaCppCuda", "LlamaCppCpu")),
}
