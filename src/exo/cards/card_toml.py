"""A model card as a TOML document."""

import re
from collections.abc import Iterator, Mapping

from pydantic import JsonValue

from exo.cards.card import ModelCard

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def card_text(card: ModelCard) -> str:
    """The document that ``ModelCard.from_toml`` reads as this card. Keys that say the default are left out."""
    fields = card.model_dump(mode="json", exclude_defaults=True, exclude={"engines"})
    tables: dict[str, JsonValue] = {name: value for name, value in fields.items() if isinstance(value, dict)}
    tables |= {name: dict(table) for name, table in card.engines.items()}
    lines = list(_pairs({name: value for name, value in fields.items() if name not in tables}))
    for name, table in tables.items():
        assert isinstance(table, dict)
        lines += ["", f"[{name}]", *_pairs(table)]
    return "\n".join(lines) + "\n"


def _pairs(table: Mapping[str, JsonValue]) -> Iterator[str]:
    for key, value in table.items():
        yield f"{key if _BARE_KEY.fullmatch(key) else _string(key)} = {_value(value)}"


def _value(value: JsonValue) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _string(value)
        case list():
            return f"[{', '.join(map(_value, value))}]"
        case dict():
            return f"{{ {', '.join(_pairs(value))} }}"
        case _:
            return repr(value)


def _string(text: str) -> str:
    """A basic string: TOML 1.0 lets it hold anything but quotation mark, backslash and control characters."""
    return '"' + "".join(f"\\u{ord(each):04x}" if each in '"\\\x7f' or each < " " else each for each in text) + '"'
