"""Makes a command of a function: expands groups of options, and ends the program with a CommandError's message."""

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import typer

from exo.cli.console import warn
from exo.exit_code import CommandError, ExitCode


def as_command(function: Callable[..., None]) -> Callable[..., None]:
    """A function for typer with the options of ``function``.

    A parameter whose type is a dataclass stands for one option per field.
    """
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            hints = get_type_hints(parameter.annotation, include_extras=True)
            parameters += [
                inspect.Parameter(each.name, parameter.KEYWORD_ONLY, annotation=hints[each.name], default=each.default)
                for each in fields(parameter.annotation)
            ]
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))

    def command(**given: Any) -> None:  # noqa: ANN401 -- as typer has parsed them
        for name, group in groups.items():
            given[name] = group(**{each.name: given.pop(each.name) for each in fields(group)})
        try:
            function(**given)
        except CommandError as error:
            warn(str(error))
            if error.code is ExitCode.INTERRUPTED:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(error.code)  # a thread that waits for a silent hub would delay the exit until its timeout
            raise typer.Exit(error.code) from error

    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command
