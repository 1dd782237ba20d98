"""Completion in bash, which takes a colon or an at sign for the end of a word: qwen2.5:0.5b is three words to it."""

import io
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress

_BREAKS = (":", "@")


def is_bash() -> bool:
    """Whether bash asks for completions."""
    return os.environ.get("_EXO_COMPLETE") == "complete_bash"


def complete_in_bash(complete: Callable[[], object]) -> None:
    """Has ``complete`` answer with whole words in the environment, and prints what bash adds to its part of a word."""
    words, at, before = whole_words(os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"]))
    os.environ |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(at)}
    answer = io.StringIO()
    with redirect_stdout(answer), suppress(SystemExit):
        complete()
    print("\n".join(line.removeprefix(before) for line in answer.getvalue().splitlines()))


def whole_words(parts: Sequence[str], at: int) -> tuple[list[str], int, str]:
    """The words of a command line, the position of the one at the cursor, and its beginning that bash keeps.

    ``parts`` are bash's words, and the cursor is in the part ``at``.
    """
    words: list[str] = []
    before = ""
    for number, part in enumerate(parts[: at + 1]):
        if number > 1 and (part in _BREAKS or parts[number - 1] in _BREAKS):
            before = words[-1] + (part if part in _BREAKS else "")
            words[-1] += part
        else:
            before = ""
            words.append(part)
    return words, len(words) - 1, before
