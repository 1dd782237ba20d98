"""``scripts/gpu_check``: tests and measures exo on a GPU, with programs that were compiled elsewhere.

``__main__``, ``options``, ``record`` and ``prepare`` run before anything is installed and use the standard library
only. ``stages`` and its imports run in the environment that they make.
"""
