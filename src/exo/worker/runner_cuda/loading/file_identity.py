"""Recognises a model's file without reading all of it."""

import hashlib
import os
from pathlib import Path

_SAMPLES, _SAMPLE = 64, 1 << 16
"""The places at which a file is read, and the bytes read at each."""


def identity(path: Path) -> tuple[int, int, str]:
    """Identifies a file by size, time and samples: hashing all of it would take longer than loading it."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        for number in range(_SAMPLES):
            file.seek(max(0, status.st_size - _SAMPLE) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return status.st_size, status.st_mtime_ns, digest.hexdigest()
