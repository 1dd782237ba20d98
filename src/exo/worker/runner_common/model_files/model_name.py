"""The names by which a card's tables say where a model is."""

from pathlib import Path

from pydantic import ValidationInfo

ADAPTER_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$"
"""The pattern of an adapter's name, which is a part of the name of a model."""


def stays_inside(name: str | None, info: ValidationInfo) -> str | None:
    """Checks a field. Only ``path``, if absolute, which the card's author then means, leaves the models directories.

    Raises ValueError.
    """
    if name is not None and (".." in Path(name).parts or "\0" in name):
        raise ValueError("must not lead out of the models directories with '..'")
    if name is not None and info.field_name != "path" and Path(name).is_absolute():
        raise ValueError("must be a name, not an absolute path")
    return name
