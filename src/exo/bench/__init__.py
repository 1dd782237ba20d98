"""``exo bench`` measures the latency and throughput of an OpenAI-compatible server, as its client sees them.

``run.run_bench`` returns a ``report``; ``table`` and ``plot`` show it.
"""
