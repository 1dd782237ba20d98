"""Says in one sentence what is wrong with data that does not follow its model."""

import json

from pydantic import ValidationError

_FIELD_LENGTH = 200


def describe(error: ValidationError) -> tuple[str, str]:
    """A validation error's first finding: the field, and a sentence with field, reason and value."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])[:_FIELD_LENGTH]
    value = json.dumps(first["input"], default=str)
    return field, f"{field}: {first['msg']} (got {value if len(value) <= 80 else value[:77] + '...'})"
