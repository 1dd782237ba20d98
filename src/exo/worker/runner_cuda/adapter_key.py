"""The text that stands for the adapters of a sequence: steps, cells and files on disk are told apart by it."""

from collections.abc import Iterable

Scaled = tuple[str, float]
"""What identifies an adapter's file, and the factor of what it changes."""


def adapter_key(used: Iterable[Scaled]) -> str:
    """Returns the key of adapters that are used together; empty if they change nothing.

    Equal effects have equal keys: neither the order counts nor an adapter with scale 0. One that is used twice has the
    sum of its scales.
    """
    scales: dict[str, float] = {}
    for identity, scale in used:
        scales[identity] = scales.get(identity, 0.0) + scale
    return ",".join(f"{identity}:{scale!r}" for identity, scale in sorted(scales.items()) if scale)


def adapters_of(key: str) -> list[Scaled]:
    """Returns the adapters for which a key stands."""
    parts = (each.split(":") for each in key.split(",") if each)
    return [(identity, float(scale)) for identity, scale in parts]
