"""The process that renders chat templates: ``python -m exo.chat.render``.

A template comes with a model, so it may be hostile. It runs here, in a sandbox, without the server's memory and under
limits of its own; whoever started the process ends it when an answer is late. One JSON object a line in
(``source`` and, to render and not only compile, ``variables``), one a line out: ``text``, or ``raised`` when the
template itself refused its input, or ``error``.
"""

import json
import resource
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

ADDRESS_SPACE = 512 << 20
"""Bytes of memory this process may map."""
SECONDS = 5
"""Wall time one request may take."""
OUTPUT_LIMIT = 4 << 20
"""Characters a rendered prompt may have."""

_TEMPLATE_FAULTS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a faulty template raises. Anything else ends the process, which its owner reports and replaces."""


class RaisedByTemplateError(Exception):
    """The template called ``raise_exception``: it does not accept this conversation."""


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's part for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - declared by Jinja as an instance's variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise RaisedByTemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    """The template in the dialect of Jinja that published chat templates are written in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    return environment.from_string(source, globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now})


def render(source: str, variables: Mapping[str, object]) -> str:
    """The rendered prompt. Raises whatever the template raises; ``ValueError`` for too much or for no valid text."""
    pieces: list[str] = []
    room = OUTPUT_LIMIT
    for piece in _compiled(source).generate(**variables):
        room -= len(piece)
        if room < 0:
            raise ValueError(f"the rendered prompt is longer than {OUTPUT_LIMIT} characters")
        pieces.append(piece)
    text = "".join(pieces)
    text.encode()  # a lone surrogate could not be sent on
    return text


def answer(line: bytes) -> dict[str, str]:
    """The answer to one request line."""
    try:
        request = json.loads(line)
        source = request["source"]
        if "variables" not in request:
            _compiled(source)
            return {"text": ""}
        return {"text": render(source, request["variables"])}
    except RaisedByTemplateError as error:
        return {"raised": str(error)[:1000]}
    except _TEMPLATE_FAULTS as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def _limit_this_process() -> None:
    for limit, value in (
        (resource.RLIMIT_AS, ADDRESS_SPACE),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # not every system can limit address space; the deadline still holds
            resource.setrlimit(limit, (value, value))


def main() -> None:
    """Serves requests until standard input closes."""
    _limit_this_process()
    for line in sys.stdin.buffer:
        # Unhandled, SIGALRM ends the process even inside one endless C call, and even if its owner is gone.
        signal.alarm(SECONDS + 1)
        reply = answer(line)
        signal.alarm(0)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
