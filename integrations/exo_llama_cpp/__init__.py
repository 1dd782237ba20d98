"""The llama.cpp runner in an environment whose package ``exo`` is another one. ``scripts/runner_wheel.py`` packs it.

``python -m exo_llama_cpp`` is the runner. Its process imports the package ``exo`` from ``TREE``.
"""

from importlib import import_module
from pathlib import Path

TREE = Path(__file__).parent / "tree"
"""The directory with the runner's package ``exo``."""


def extend() -> None:
    """Adds the modules of ``TREE`` to the environment's package ``exo``, whose own modules come first."""
    for name in ("exo", "exo.worker"):
        found = str(TREE / name.replace(".", "/"))
        if found not in (path := import_module(name).__path__):
            path.append(found)
