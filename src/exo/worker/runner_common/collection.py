"""Garbage collection around the start of a runner.

An engine's libraries make up to a million objects that stay. To look through them again and again takes a quarter of
vLLM's start, and a whole collection among them would delay each stream by a third of a second.
"""

import gc

_USUAL = gc.get_threshold()
_AT_START = 50_000
"""Objects made since the last collection; seventy times Python's own number."""


def collect_rarely() -> None:
    """For the start of a program, before it imports its libraries."""
    gc.set_threshold(_AT_START)


def collect_as_usual() -> None:
    """For a loaded model. Later collections leave out all objects that exist now."""
    gc.freeze()
    gc.set_threshold(*_USUAL)
