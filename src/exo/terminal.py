"""Makes foreign text safe for a terminal."""


def printable(text: str) -> str:
    """Escapes control and invisible characters as in a Python literal, except line ends and tabs."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    return character if character.isprintable() or character in "\n\t\u200d\ufe0f" else repr(character)[1:-1]
