"""Reads a dashboard with Grafana's own models of it, and writes it again: nothing may be lost or different."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard


def lost(given: object, read: object, path: str = "") -> Iterator[str]:
    """Yields the paths of values that Grafana's models do not have."""
    if isinstance(given, dict) and isinstance(read, dict):
        for key, value in given.items():
            yield from lost(value, read.get(key), f"{path}/{key}")
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for number, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from lost(one, other, f"{path}/{number}")
    elif given != read:
        yield f"{path}: {given!r} became {read!r}"


register_default_plugins()
given = json.loads(Path(sys.argv[1]).read_text())
read = json.loads(JSONEncoder().encode(Dashboard.from_json(given)))
for line in lost(given, read):
    sys.exit(line)
assert len(read["panels"]) > 10
print("ok")
