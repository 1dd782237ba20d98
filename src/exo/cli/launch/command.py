"""``exo launch``: starts a program of others with this server and a model."""

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from types import FrameType
from typing import Annotated

import httpx
import typer
from pydantic import BaseModel, ValidationError

from exo.api.admin.runners import Instance, InstanceList
from exo.cards.catalogue import FoundModel
from exo.cli.console import err, say, warn
from exo.cli.launch.programs import PROGRAMS, Program, Target
from exo.cli.models.local_models import catalogue_of
from exo.cli.models.named_model import requested_model
from exo.cli.options import ModelsDir, ServerOptions, complete_model
from exo.cli.server.embedded_server import some_server
from exo.cli.server.http_client import ask, foreign, server_client
from exo.exit_code import CommandError, ExitCode

_NAMES = ", ".join(PROGRAMS)


def _complete_program(incomplete: str) -> list[str]:
    return [name for name in PROGRAMS if name.startswith(incomplete)]


class _RouteReply(BaseModel):
    model: str


@dataclass(frozen=True, slots=True)
class _Invocation:
    """All that starts a program."""

    command: list[str]
    environment: Mapping[str, str]
    files: Mapping[Path, str]


def launch(
    program: Annotated[str, typer.Argument(help=f"The program: {_NAMES}.", autocompletion=_complete_program)],
    args: Annotated[list[str] | None, typer.Argument(help="Arguments of the program, after --.")] = None,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model id or alias, hf.co/OWNER/NAME[:QUANT], or a path. Default: the model that is loaded.",
            autocompletion=complete_model,
        ),
    ] = None,
    print_: Annotated[
        bool, typer.Option("--print", help="Print the environment, files and command instead of starting it.")
    ] = False,
    server: ServerOptions,
    models_dir: ModelsDir = None,
) -> None:
    """Start a coding agent or chat UI with a model of the running server or, if there is none, of a server of its own.

    The program's own settings stay as they are: it is told the server, the model and the context length by its
    environment, its arguments or temporary files.
    """
    known = PROGRAMS.get(program)
    if known is None:
        raise CommandError(f"{program!r} is not a program that exo can launch; it knows {_NAMES}", ExitCode.USAGE)
    settings = server.settings(models_dir)
    own: Sequence[FoundModel] = ()
    if model is not None:
        named = requested_model(settings, model)
        model, own = named.name, named.own
    if print_:
        with server_client(settings) as client:
            told = _target(client, model, Path(gettempdir()) / "exo-launch")
        _show(_invocation(known, told, args or [], known.command))
        _warn_of_context(known, told)
        return
    executable = shutil.which(known.command)
    if executable is None:
        raise CommandError(f"{known.title} is not installed: there is no {known.command!r}; {known.install}")
    with (
        TemporaryDirectory(prefix="exo-launch-") as folder,
        some_server(settings, lambda: catalogue_of(settings, own)) as client,
    ):
        told = _target(client, model, Path(folder))
        _warn_of_context(known, told)
        code = _run(_invocation(known, told, args or [], executable))
        _warn_of_context(known, told)  # again, since a program that fills the screen has covered it
    if code:
        raise typer.Exit(code)


def _target(client: httpx.Client, model: str | None, folder: Path) -> Target:
    """Loads the model, so that its context length is known. Raises CommandError."""
    name = model or _only_model(client)
    with err.status(f"loading {name}"):
        ask(client, "/tokenize", body={"model": name, "content": "a"}, seconds=None)
    try:
        model_id = _RouteReply.model_validate_json(ask(client, "/v1/route", params={"model": name})).model
    except ValidationError as error:
        raise foreign(client) from error
    lengths = [each.context_length for each in _instances(client) if each.model == model_id and each.context_length]
    if not lengths:
        raise CommandError(f"{name} was unloaded again before its context length was known; try again")
    key = client.headers.get("authorization", "Bearer unused").removeprefix("Bearer ")
    return Target(str(client.base_url).rstrip("/"), key, name, model_id, min(lengths), folder)


def _only_model(client: httpx.Client) -> str:
    """Raises CommandError if several models are loaded, or none."""
    loaded = sorted({each.model for each in _instances(client) if each.context_length})
    if len(loaded) == 1:
        return loaded[0]
    state = f"{', '.join(loaded)} are loaded" if loaded else "no model is loaded"
    raise CommandError(f"{state}; name the model with --model (`exo list` shows all)", ExitCode.USAGE)


def _instances(client: httpx.Client) -> list[Instance]:
    try:
        return InstanceList.model_validate_json(ask(client, "/v1/instances")).data
    except ValidationError as error:
        raise foreign(client) from error


def _invocation(program: Program, target: Target, arguments: list[str], executable: str) -> _Invocation:
    return _Invocation(
        command=[executable, *program.arguments(target), *arguments],
        environment=program.environment(target),
        files={target.folder / name: text for name, text in program.files(target).items()},
    )


def _warn_of_context(program: Program, target: Target) -> None:
    if target.context < program.first_prompt:
        warn(
            f"{target.model} has a context of {target.context:,} tokens here, but the first prompt of {program.title}"
            f' alone has about {program.first_prompt:,}; set n_ctx in the model card, for example to "auto"'
        )


def _show(invocation: _Invocation) -> None:
    """Prints commands for a shell."""
    for path, text in invocation.files.items():
        say(f"mkdir -p {shlex.quote(str(path.parent))}\ncat > {shlex.quote(str(path))} <<'EOF'\n{text.rstrip()}\nEOF")
    for name, value in invocation.environment.items():
        say(f"export {name}={shlex.quote(value)}")
    say(shlex.join(invocation.command))


def _ignore(_signal: int, _frame: FrameType | None) -> None:
    pass


def _run(invocation: _Invocation) -> int:
    """Runs the program until it ends, and returns its exit status. Ctrl-C is the program's."""
    for path, text in invocation.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    # A handler, unlike SIG_IGN, is not inherited by the program.
    before = signal.signal(signal.SIGINT, _ignore)
    try:
        code = subprocess.Popen(invocation.command, env={**os.environ, **invocation.environment}).wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code
