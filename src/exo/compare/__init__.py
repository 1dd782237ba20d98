"""``exo compare`` measures how far two engines agree on one model.

``run`` controls the comparison: ``scoring`` has each engine read texts, ``generation`` has it continue them;
``divergence`` and ``agreement`` compute the differences; ``table`` and ``plot`` show the resulting ``comparison``.
"""
