"""The MLX runner as a program: ``python -m exo.worker.runner_mlx``, or with ``--probe`` or ``--score``.

``--rank TRANSPORT ADDRESS`` computes a part of a model whose runner is on another host.
"""

import os
import sys

from exo.worker.runner_common.main import run
from exo.worker.runner_mlx.probe import probe


def main() -> None:
    """Runs the program."""
    if sys.argv[1:] != ["--probe"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # a file that is not in the folder is an error and must not be downloaded
    if sys.argv[1:2] == ["--rank"]:
        from exo.worker.runner_mlx.ranks import rank_main

        rank_main.main()
    run("exo.worker.runner_mlx", probe)


if __name__ == "__main__":
    main()
