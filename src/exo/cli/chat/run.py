"""``exo run``: answers one prompt with its files and piped text."""

import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from exo.chat.output.events import Content, Reasoning
from exo.cli.chat.answer_stream import Note, answer
from exo.cli.console import err, out
from exo.cli.models.local_models import catalogue_of
from exo.cli.models.named_model import requested_model
from exo.cli.options import AnyModel, ModelsDir, SamplingOptions, ServerOptions
from exo.cli.server.embedded_server import some_server
from exo.exit_code import CommandError, ExitCode
from exo.terminal import printable


def run(
    model: AnyModel,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; piped text is put behind it.")] = None,
    *,
    file: Annotated[list[Path] | None, typer.Option(help="A text file to add; repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    json_schema: Annotated[Path | None, typer.Option(help="A file with the JSON Schema of the answer.")] = None,
    sampling: SamplingOptions,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt unchanged, without chat template.")] = False,
    server: ServerOptions,
    models_dir: ModelsDir = None,
) -> None:
    """Answer one prompt through the running server or, if there is none, through a runner of its own."""
    if raw and system is not None:
        raise CommandError("--system: not accepted together with --raw, which has no messages", ExitCode.USAGE)
    settings = server.settings(models_dir)
    body: dict[str, object] = {**sampling.request_fields()}
    if json_schema is not None:
        body["structured_outputs"] = {"json": _schema(json_schema)}
    whole = _compose(prompt, file or (), _read_pipe(), raw=raw)
    if raw:
        body["prompt"] = whole
    else:
        first = [{"role": "system", "content": system}] if system is not None else []
        body["messages"] = [*first, {"role": "user", "content": whole}]
    named = requested_model(settings, model)
    body["model"] = named.name
    with err.status("starting") as status:

        def show(text: str) -> None:
            status.stop()
            out.file.write(printable(text) if out.is_terminal else text)
            out.file.flush()

        with some_server(settings, lambda: catalogue_of(settings, named.own)) as client, answer(client, body) as events:
            for event in events:
                match event:
                    case Content(text):
                        show(text)
                    case Reasoning():
                        status.update("thinking")
                    case Note(text):
                        status.update(printable(text))
                    case _:
                        pass
        show("\n")


def _schema(path: Path) -> object:
    """Raises CommandError."""
    try:
        return json.loads(read_text("--json-schema", path))
    except ValueError as error:
        raise CommandError(f"--json-schema: {path} is not JSON: {error}", ExitCode.USAGE) from error


def _compose(prompt: str | None, files: Sequence[Path], piped: str | None, *, raw: bool) -> str:
    """One prompt: the typed words, each file below its name, and the piped text, with blank lines between them.

    A raw prompt is their concatenation. Raises CommandError if a file is not text, or if everything is empty.
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
    """The text of a file. Raises CommandError, which names the flag."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{flag}: {path} cannot be read as text: {error}", ExitCode.USAGE) from error


def _read_pipe() -> str | None:
    """The text that is piped or redirected into standard input; None if it is a terminal or closed.

    Raises CommandError if it is not text.
    """
    try:
        kind = os.fstat(0).st_mode
        return sys.stdin.buffer.read().decode() if stat.S_ISFIFO(kind) or stat.S_ISREG(kind) else None
    except UnicodeDecodeError as error:
        raise CommandError(f"standard input is not text: {error}", ExitCode.USAGE) from error
    except OSError:
        return None  # closed
