"""The process that renders chat templates: ``python -m exo.chat.template.render_main``.

A template comes with a model, so it may be hostile. It runs here, in a sandbox, without the server's memory and under
limits of its own; whoever started the process ends it when an answer is late. One JSON object a line in (``source``
and, to render and not only compile, ``variables`` and perhaps ``extra`` ones, each of which the template has to read),
one a line out: ``text``, or ``raised`` when the template itself refused its input, or ``unread`` with the name of a
variable that would have no effect, or ``error``. The first line out, an empty object, says that the process is up.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import NoReturn, cast

from jinja2 import Template, TemplateError, UndefinedError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

from exo.chat.template.sandbox_main import serve
from exo.chat.template.token_marks import CLOSE, OPEN

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


def _raise_exception(message: str) -> NoReturn:
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
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_listed
    )
    if ensure_ascii:
        for mark in (OPEN, CLOSE):
            text = text.replace(json.dumps(mark)[1:-1], mark)
    return text


def _listed(value: object) -> list[object]:
    """For ``json.dumps``: what Jinja's filters such as ``map`` make is no list yet."""
    if isinstance(value, Iterator):
        return list(cast("Iterator[object]", value))
    raise TypeError(f"a {type(value).__name__} is not JSON")


class _Arguments(dict[str, object]):
    """A call's arguments: an object to the templates that look inside or write it as JSON, its JSON to the others."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, after: object) -> str:
        return f"{self}{after}"

    def __radd__(self, before: object) -> str:
        return f"{before}{self}"


def _with_arguments(value: dict[str, object]) -> dict[str, object]:
    """For ``json.loads``, which calls this with every object, the innermost first."""
    if isinstance(arguments := value.get("arguments"), dict) and isinstance(value.get("name"), str):
        value["arguments"] = _Arguments(cast("dict[str, object]", arguments))
    return value


_FUNCTIONS: Mapping[str, Callable[[str], str]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


@lru_cache(maxsize=1)
def _environment() -> SandboxedEnvironment:
    """The dialect of Jinja that published chat templates are written in. Some append to lists, which are all theirs."""
    environment = SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag])
    environment.filters["tojson"] = _tojson
    return environment


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    return _environment().from_string(source, globals=dict(_FUNCTIONS))


@lru_cache(maxsize=16)
def _read_by(source: str) -> frozenset[str]:
    """The variables that the template reads."""
    return frozenset(meta.find_undeclared_variables(_environment().parse(source)))


class UnreadVariableError(Exception):
    """The template does not read this variable, so that giving it would have no effect; or it is not the caller's."""


_HAS_DEFAULT = re.compile(r"\benable_thinking\s*(?:is\s+(?:not\s+)?(?:defined|none|true)|\|\s*default)")
_BY_DEFAULT: Mapping[str, Callable[[Mapping[str, object]], object]] = {
    "date_string": lambda _: _strftime_now("%d %b %Y"),
    "datetime": lambda _: _strftime_now("%b %d %Y"),
    "functions": lambda variables: _tojson(variables.get("tools") or [], indent=2),
    "enable_thinking": lambda _: True,
}
"""What templates are given that read it and whose caller does not say."""


def _all_variables(source: str, variables: Mapping[str, object], extra: Mapping[str, object]) -> Mapping[str, object]:
    """All that the template is given. Raises ``UnreadVariableError``.

    Of ``variables`` only the tools have to be read. Templates call one switch by two names. A template that asks for
    ``enable_thinking`` and does not tell what holds without it expects that it is on.
    """
    read = _read_by(source)
    if variables.get("tools") and not read & {"tools", "functions"}:
        raise UnreadVariableError("tools")
    if "enable_thinking" in extra and "enable_thinking" not in read and "thinking" in read - extra.keys():
        extra = {("thinking" if name == "enable_thinking" else name): value for name, value in extra.items()}
    free = read - variables.keys() - _environment().globals.keys() - _FUNCTIONS.keys()
    for name in extra:
        if name not in free:
            raise UnreadVariableError(name)
    lacking = free & _BY_DEFAULT.keys() - extra.keys()
    if _HAS_DEFAULT.search(source):
        lacking -= {"enable_thinking"}
    return {**variables, **{name: _BY_DEFAULT[name](variables) for name in lacking}, **extra}


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


def _rendered(source: str, variables: Mapping[str, object]) -> str:
    """The same. A template that fails with tools of this form, or with none, gets the functions alone, or no item."""
    try:
        return render(source, variables)
    except (TypeError, UndefinedError):
        tools = cast("list[dict[str, object]]", variables.get("tools") or [])
        return render(source, {**variables, "tools": [tool["function"] for tool in tools]})


def answer(line: bytes) -> dict[str, str]:
    """The answer to one request line."""
    try:
        request = json.loads(line, object_hook=_with_arguments)
        source = request["source"]
        if "variables" not in request:
            _compiled(source)
            return {"text": ""}
        return {"text": _rendered(source, _all_variables(source, request["variables"], request.get("extra", {})))}
    except UnreadVariableError as error:
        return {"unread": str(error)}
    except RaisedByTemplateError as error:
        return {"raised": str(error)[:1000]}
    except _TEMPLATE_FAULTS as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


if __name__ == "__main__":
    serve(answer, seconds=SECONDS, address_space=ADDRESS_SPACE)
