"""The MLX runner as a program: ``python -m exo.worker.runner_mlx``, or with ``--probe`` or ``--score``."""

from typing import TYPE_CHECKING, BinaryIO

from exo.worker.runner_common.main import run
from exo.worker.runner_mlx.probe import probe

if TYPE_CHECKING:
    from exo.worker.runner_common.front_end import FrontEnd
    from exo.worker.runner_common.output_processor import Emitter
    from exo.worker.runner_mlx.sequence import MlxSequence


def main() -> None:
    """Runs the program."""
    run(probe, _front_end, _score)


def _front_end(emitter: "Emitter") -> "FrontEnd[MlxSequence]":
    from exo.worker.runner_mlx.runner import front_end

    return front_end(emitter)


def _score(protocol: BinaryIO) -> int:
    from exo.worker.runner_mlx.score import score

    return score(protocol)


if __name__ == "__main__":
    main()
