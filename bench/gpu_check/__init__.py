"""``scripts/gpu_check``: builds llama.cpp for the GPU from an archive, and tests and measures exo on it.

``__main__``, ``options``, ``record``, ``toolchain`` and ``build`` run before anything is installed and use the standard
library only. ``stages`` and its imports run in the environment that they make.
"""
