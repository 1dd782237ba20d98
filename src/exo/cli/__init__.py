"""The command line. A command's module is imported when the command runs, so that ``exo --help`` is instant."""

import errno
import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from exo.cli.completion import complete_in_bash, is_bash
from exo.exit_code import EXIT_CODES, ExitCode

COMMANDS = {
    "serve": ("exo.cli.server.serve:serve", "Serve models on one OpenAI-compatible endpoint."),
    "run": ("exo.cli.chat.run:run", "Answer one prompt."),
    "chat": ("exo.cli.chat.command:chat", "Talk with a model at the terminal."),
    "pull": ("exo.cli.models.pull:pull", "Download a model's files."),
    "list": ("exo.cli.models.list:list_models", "List the models that have a model card."),
    "show": ("exo.cli.models.show:show", "Show a model's card, files and engines."),
    "add": ("exo.cli.models.add:add", "Write a model card for a repository on the hub."),
    "rm": ("exo.cli.models.rm:remove", "Delete a model's downloaded files."),
    "launch": ("exo.cli.launch.command:launch", "Start a coding agent or chat UI with a model."),
    "ps": ("exo.cli.server.ps:ps", "Show the models that the running server has loaded."),
    "top": ("exo.cli.server.top:top", "Show the running server's models, memory and requests, live."),
    "stop": ("exo.cli.server.stop:stop", "Unload a model from the running server."),
    "node": ("exo.cli.node:node", "Tell a server on another machine what this one has. A server starts it."),
    "route": ("exo.cli.route:route", "Show which runner would serve a model here, and why."),
    "doctor": (
        "exo.cli.doctor.command:doctor",
        "Show which engines work on this machine, and how to repair the others.",
    ),
    "setup": ("exo.cli.setup:setup", "Set up an engine on this machine, or the demo model."),
    "service": ("exo.cli.server.service:service", "Run the server with systemd."),
    "convert": ("exo.cli.convert:convert", "Convert a model between GGUF and safetensors."),
    "compare": ("exo.cli.compare:compare", "Measure how far two engines agree on one model."),
    "bench": ("exo.cli.bench:bench", "Measure the latency and throughput of a server."),
}
"""The module and function of each command, and its line in ``exo --help``."""


_STDOUT, _STDERR = 1, 2
_UNWRITABLE = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG)


class _CommandTable(Mapping[str, Any]):
    """Makes a command of its function when it is looked up."""

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 -- typer does not export the type
        module, _, function = COMMANDS[name][0].partition(":")
        from exo.cli.command import as_command

        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name)(as_command(getattr(import_module(module), function)))
        return typer.main.get_command(single)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _CommandGroup(TyperGroup):
    def __init__(self, **attributes: Any) -> None:  # noqa: ANN401 -- passed on unread
        super().__init__(**attributes)
        self.commands: Any = _CommandTable()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


app = typer.Typer(
    name="exo",
    cls=_CommandGroup,
    help="One OpenAI-compatible endpoint over several local inference engines. Without a command: exo serve.",
    epilog=f"\b\nExit status of every command:\n{EXIT_CODES}\n\n"
    "exo --install-completion teaches your shell (bash, zsh, fish, PowerShell) the commands, options and model names.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _exo(context: typer.Context) -> None:
    """Serves if no command is given, as upstream's ``exo`` does."""
    if context.invoked_subcommand is None:
        command = _CommandTable()["serve"]
        with command.make_context("serve", [], parent=context) as inner:
            command.invoke(inner)


def main() -> None:
    """Entry point of the ``exo`` command."""
    _repair_streams()
    try:
        sys.argv = [os.fsencode(argument).decode() for argument in sys.argv]  # also in a locale other than UTF-8
    except UnicodeDecodeError:
        print(f"exo: the arguments must be UTF-8: {sys.argv[1:]!a}", file=sys.stderr)
        sys.exit(ExitCode.USAGE)
    try:
        try:
            if is_bash():
                complete_in_bash(app)
            else:
                app()
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in _UNWRITABLE or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # the buffered output goes there at exit
        sys.exit(f"exo: standard output cannot be written: {error.strerror}")


class _Unchecked(io.FileIO):
    """A file whose data is lost where it cannot be written, as on a full disk or a terminal that was closed."""

    def write(self, data: Any, /) -> int:  # noqa: ANN401 -- any buffer
        with suppress(OSError):
            return super().write(data)
        return len(data)


def _repair_streams() -> None:
    """Opens the standard streams that are closed, and has a question mark written for what the locale cannot.

    A message on standard error that cannot be written does not end a command.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # the next file to be opened would take its place
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    output = sys.stdout
    if isinstance(output, io.TextIOWrapper):
        output.reconfigure(errors="replace")
    encoding = sys.stderr.encoding if sys.stderr else None
    unchecked = io.BufferedWriter(_Unchecked(_STDERR, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(unchecked, encoding, errors="replace", line_buffering=True)
