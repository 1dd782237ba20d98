"""The page ``/docs``: the OpenAPI document as HTML, without scripts."""

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_Schema = Mapping[str, Any]
_LIMITS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
    "minLength": "of a length from",
    "maxLength": "of a length to",
    "minItems": "of a length from",
    "maxItems": "of a length to",
    "pattern": "that matches",
}
_FORM = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>The HTTP API · exo</title>
<link rel="icon" href="{folder}/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="{folder}/style.css">
</head>
<body>
<header><h1>exo {version}: the HTTP API</h1><nav aria-label="Other pages"><a href="./">The page</a>
<a href="openapi.json">For programs</a></nav></header>
<main id="main" tabindex="-1">
<p class="description">{description}</p>
<h2>Routes</h2>
{routes}
<h2>Objects</h2>
{objects}
</main>
</body>
</html>
"""


def reference_page(document: _Schema, folder: str) -> str:
    """HTML that has every route and every field of ``document``. ``folder`` holds the page's style and icon."""
    return _FORM.format(
        folder=folder,
        version=escape(document["info"]["version"]),
        description=escape(document["info"]["description"].strip()),
        routes="\n".join(_routes(document)),
        objects="\n".join(
            _folded(f"<strong>{name}</strong>", f'<div id="{name}">{_object(schema)}</div>')
            for name, schema in sorted(document["components"]["schemas"].items())
        ),
    )


def _routes(document: _Schema) -> Iterator[str]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parameters = [
                _row(each["name"], each["schema"], required=each["required"], about=each.get("description", ""))
                for each in operation.get("parameters", ())
            ]
            inside = _table(parameters) if parameters else ""
            messages = {"Body": operation.get("requestBody", {}), "Reply": operation["responses"].get("200", {})}
            for kind, message in messages.items():
                if (schema := message.get("content", {}).get("application/json", {}).get("schema")) is not None:
                    inside += f"<p>{kind}: {_type(schema)}</p>"
            name = f"<strong>{method.upper()} {escape(path)}</strong> {escape(operation['summary'])}"
            yield _folded(name, inside)


def _folded(name: str, inside: str) -> str:
    return f'<details class="model"><summary>{name}</summary>{inside}</details>'


def _object(schema: _Schema) -> str:
    about = f'<p class="description">{escape(schema["description"])}</p>' if "description" in schema else ""
    if "properties" not in schema:
        return f"{about}<p>{_type(schema)}</p>"
    needed = schema.get("required", ())
    rows = [
        _row(name, each, required=name in needed, about=each.get("description", ""))
        for name, each in schema["properties"].items()
    ]
    return about + _table(rows)


def _table(rows: list[str]) -> str:
    head = "<tr><th>Name</th><th>Type</th><th>Default</th><th>Meaning</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _row(name: str, schema: _Schema, *, required: bool, about: str) -> str:
    default = "" if schema.get("default") is None else f"<code>{escape(json.dumps(schema['default']))}</code>"
    cells = (f"<code>{escape(name)}</code>", _type(schema), "required" if required else default, escape(about))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _type(schema: _Schema) -> str:
    """The kind of a value, as HTML."""
    match schema:
        case {"$ref": str(target)}:
            name = target.rpartition("/")[2]
            return f'<a href="#{name}">{name}</a>'
        case {"anyOf": parts} | {"oneOf": parts} | {"allOf": parts}:
            return " or ".join(dict.fromkeys(map(_type, parts)))
        case {"enum": values}:
            return escape(" or ".join(map(json.dumps, values)))
        case {"const": value}:
            return escape(json.dumps(value))
        case {"type": "array", "items": items}:
            return f"array{_limits(schema)} of {_type(items)}"
        case {"type": "object", "additionalProperties": {**values}} if values:
            return f"object of {_type(values)}"
        case _:
            return f"{schema.get('type', 'any value')}{_limits(schema)}"


def _limits(schema: _Schema) -> str:
    return "".join(f" {text} {escape(str(schema[key]))}" for key, text in _LIMITS.items() if key in schema)
