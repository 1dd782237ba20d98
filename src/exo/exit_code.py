"""The exit statuses of the commands, and the exception that ends a command."""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit status of every ``exo`` command. ``exo --help`` shows ``EXIT_CODES``."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNREACHABLE = 4
    INTERRUPTED = 130


EXIT_CODES = """\
  0    done
  1    failed; the cause and the remedy are on standard error
  2    the command line, a setting or a file given with it cannot be used
  3    there is no such model, or its files are not on disk
  4    no server answers: exo's own or, for commands that ask the hub, the hub
  130  interrupted; downloaded files are kept"""


class CommandError(Exception):
    """Ends a command; the message says why and what to do."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code
