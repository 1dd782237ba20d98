"""The chat templates of a model folder, which may be in four places."""

from collections.abc import Callable, Mapping

from pydantic import JsonValue, TypeAdapter, ValidationError

DEFAULT, TOOL_USE = "default", "tool_use"
_MORE = (TOOL_USE, "rag")
_OBJECT: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])


def chat_templates(read: Callable[[str], bytes | None]) -> dict[str, str]:
    """The templates by name, the usual one as "default". ``read`` gives a file's content, None for an absent one.

    Jinja files come before tokenizer_config.json, and that before chat_template.json, as in transformers. Raises
    ValueError, whose message continues a sentence about the folder, and what ``read`` raises.
    """
    found = dict[str, str]()
    for file in ("chat_template.json", "tokenizer_config.json"):
        match _object(file, read(file)).get("chat_template"):
            case str(template):
                found[DEFAULT] = template
            case list(several):
                found |= _named(several)
            case _:
                pass
    if (alone := read("chat_template.jinja")) is not None:
        found[DEFAULT] = alone.decode(errors="replace")
    for name in _MORE:
        if (more := read(f"additional_chat_templates/{name}.jinja")) is not None:
            found[name] = more.decode(errors="replace")
    return found


def usual(templates: Mapping[str, str]) -> str | None:
    """The template for requests without tools."""
    return templates.get(DEFAULT) or next(iter(templates.values()), None)


def _object(file: str, content: bytes | None) -> dict[str, JsonValue]:
    try:
        return _OBJECT.validate_json(content or b"{}")
    except ValidationError as error:
        raise ValueError(f"has a {file} that is no JSON object: {error.errors()[0]['msg']}") from error


def _named(several: list[JsonValue]) -> dict[str, str]:
    return {
        name: template
        for each in several
        if isinstance(each, dict)
        and isinstance(name := each.get("name"), str)
        and isinstance(template := each.get("template"), str)
    }
