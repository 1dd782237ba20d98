"""The MLX runner as a program: ``python -m exo.worker.runner_mlx``, or with ``--probe`` or ``--score``."""

from exo.worker.runner_common.main import run
from exo.worker.runner_mlx.probe import probe


def main() -> None:
    """Runs the program."""
    run("exo.worker.runner_mlx", probe)


if __name__ == "__main__":
    main()
