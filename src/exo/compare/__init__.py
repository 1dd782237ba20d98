"""``exo compare``: evidence, on real numbers, of how far two engines agree on one model.

``run`` holds it together: ``scoring`` reads texts through each engine, ``generation`` lets each continue them, one
engine at a time; ``divergence`` and ``agreement`` compare what came out; ``comparison`` is the result, which ``table``
and ``plot`` show. Engines are runners, driven through the contract alone.
"""
