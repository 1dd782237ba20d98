"""``scripts/gpu_check``: builds llama.cpp for the card at hand from an archive, and tests and measures exo on it.

``__main__``, ``options``, ``record``, ``toolchain``, ``environment`` and ``build`` run before anything is installed and
use the standard library alone; ``stages`` and what it imports run in the environment that they make.
"""
