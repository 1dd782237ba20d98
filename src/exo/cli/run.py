"""``exo run``: one prompt, its files and what is piped in, and the answer."""

import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from exo.chat.output.events import Content, Reasoning
from exo.cli.answer_stream import Note, answer
from exo.exit_code import CommandError, ExitCode


@dataclass(frozen=True, slots=True)
class Screen:
    """Where an answer and what is said about its making go."""

    text: Callable[[str], None]
    note: Callable[[str], None]


def run_prompt(client: httpx.Client, body: Mapping[str, object], screen: Screen) -> None:
    """Streams the answer to a chat or completion request (OpenAI's body) to ``screen``. Raises CommandError."""
    with answer(client, body) as events:
        for event in events:
            match event:
                case Content(text):
                    screen.text(text)
                case Reasoning():
                    screen.note("thinking")
                case Note(text):
                    screen.note(text)
                case _:
                    pass


def compose(prompt: str | None, files: Sequence[Path], piped: str | None, *, raw: bool) -> str:
    """One prompt: the words typed, each file below its name, and what was piped in, blank lines between them.

    A raw prompt is all of it as it stands, end to end. Raises CommandError for a file that is no text, and where there
    is nothing at all.
    """
    texts = [(path, read_text("--file", path)) for path in files]
    if raw:
        whole = "".join([prompt or "", *(text for _, text in texts), piped or ""])
    else:
        named = [f"{path.name}:\n{text.rstrip()}" for path, text in texts]
        whole = "\n\n".join(part for part in (prompt, *named, piped and piped.rstrip()) if part)
    if not whole:
        raise CommandError("nothing to say: give a prompt, a --file, or pipe something in", ExitCode.USAGE)
    return whole


def read_text(flag: str, path: Path) -> str:
    """A file of text. Raises CommandError, which names the flag."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{flag}: {path} cannot be read as text: {error}", ExitCode.USAGE) from error


def read_pipe() -> str | None:
    """What is piped into standard input, or redirected there from a file; None where it is anything else.

    Raises CommandError for what is no text.
    """
    try:
        kind = os.fstat(0).st_mode
        return sys.stdin.buffer.read().decode() if stat.S_ISFIFO(kind) or stat.S_ISREG(kind) else None
    except UnicodeDecodeError as error:
        raise CommandError(f"standard input is not text: {error}", ExitCode.USAGE) from error
    except OSError:
        return None  # it is closed
