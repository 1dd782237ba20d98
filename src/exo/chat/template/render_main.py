"""The sandbox program that renders chat templates, which come with models and may be hostile.

A request has the ``source`` and, to render and not only compile, ``variables`` and ``extra`` variables, which
the template must read. The answer has the ``text``, or ``raised`` if the template refused its input, or ``unread`` with
the name of a variable that would have no effect, or ``error``.
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

from exo.worker.runner_common.sandbox import SandboxLimits, serve

# The marks around special tokens that are taken literally (``exo.chat.template.special_tokens``). They are Unicode
# noncharacters, which valid text does not contain.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
_OUTPUT_LIMIT = 4 << 20
"""Characters a rendered prompt may have."""
# JSON takes up to twelve bytes for a character.
LIMITS = SandboxLimits(seconds=30, address_space=512 << 20, answer_bytes=12 * _OUTPUT_LIMIT + 1024, cpu_seconds=5)

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
"""Exceptions of faulty templates. Any other ends the process, which its owner reports and replaces."""


class RaisedByTemplateError(Exception):
    """The template called ``raise_exception``: it does not accept this conversation."""


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's part for training. Only its body is rendered."""

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
    """For ``json.dumps``: Jinja's filters such as ``map`` return iterators."""
    if isinstance(value, Iterator):
        return list(cast("Iterator[object]", value))
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


class _CallArguments(dict[str, object]):
    """A call's arguments: an object for templates that look inside or use ``tojson``, its JSON for the others."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, after: object) -> str:
        return f"{self}{after}"

    def __radd__(self, before: object) -> str:
        return f"{before}{self}"


def _with_arguments(value: dict[str, object]) -> dict[str, object]:
    """For ``json.loads``, which calls this for every object, innermost first."""
    if isinstance(arguments := value.get("arguments"), dict) and isinstance(value.get("name"), str):
        value["arguments"] = _CallArguments(cast("dict[str, object]", arguments))
    return value


_FUNCTIONS: Mapping[str, Callable[[str], str]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


@lru_cache(maxsize=1)
def _environment() -> SandboxedEnvironment:
    """Returns the Jinja environment that published chat templates expect. They may modify lists, which are copies."""
    environment = SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag])
    environment.filters["tojson"] = _tojson
    return environment


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    return _environment().from_string(source, globals=dict(_FUNCTIONS))


@lru_cache(maxsize=16)
def _read_by(source: str) -> frozenset[str]:
    """Returns the variables that the template reads."""
    return frozenset(meta.find_undeclared_variables(_environment().parse(source)))


class UnreadVariableError(Exception):
    """The template does not read this variable, so that it would have no effect, or callers may not set it."""


_HAS_DEFAULT = re.compile(r"\benable_thinking\s*(?:is\s+(?:not\s+)?(?:defined|none|true)|\|\s*default)")
_BY_DEFAULT: Mapping[str, Callable[[Mapping[str, object]], object]] = {
    "date_string": lambda _: _strftime_now("%d %b %Y"),
    "datetime": lambda _: _strftime_now("%b %d %Y"),
    "functions": lambda variables: _tojson(variables.get("tools") or [], indent=2),
    "enable_thinking": lambda _: True,
}
"""Variables for templates that read them, if the caller does not set them."""


def _all_variables(source: str, variables: Mapping[str, object], extra: Mapping[str, object]) -> Mapping[str, object]:
    """Returns all variables of the template. Raises ``UnreadVariableError``.

    The template need not read ``variables``, except the tools. The switch for reasoning has two names. A template that
    reads ``enable_thinking`` without a default expects that it is on.
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
    """Returns the rendered prompt. Raises what the template raises, or ``ValueError`` if it is too long or invalid."""
    pieces: list[str] = []
    room = _OUTPUT_LIMIT
    for piece in _compiled(source).generate(**variables):
        room -= len(piece)
        if room < 0:
            raise ValueError(f"the rendered prompt is longer than {_OUTPUT_LIMIT} characters")
        pieces.append(piece)
    text = "".join(pieces)
    text.encode()  # a lone surrogate could not be sent on
    return text


def _rendered(source: str, variables: Mapping[str, object]) -> str:
    """Renders the prompt. If the template fails, it gets the bare functions instead of tools, or an empty list."""
    try:
        return render(source, variables)
    except (TypeError, UndefinedError):
        tools = cast("list[dict[str, object]]", variables.get("tools") or [])
        return render(source, {**variables, "tools": [tool["function"] for tool in tools]})


def answer(line: bytes) -> dict[str, str]:
    """Returns the answer to one request line."""
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
    serve(lambda _: answer, LIMITS)
