"""The pictures in requests of all dialects: data: URLs, files in base64, and addresses."""

from pydantic import JsonValue
from pydantic_core import PydanticCustomError

from exo.api.http.body import add_picture, invalid, note, unsupported
from exo.serving.pictures.prompt_pictures import UNSEEN, GivenPicture

PICTURE_PARTS = ("image_url", "input_image", "image")
_TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp", "image/gif")


def picture_text(part: dict[str, JsonValue], field: str, path: str, *, answered: bool) -> JsonValue:
    """Returns a part of text with the mark of a part that is a picture. ``path`` is the part's place in ``field``.

    A picture that the reply is not about may have any form: if it cannot be read, it becomes a sentence. Raises
    ``PydanticCustomError`` that names the part.
    """
    kind = str(part.get("type"))
    told = f"{_names(field, path).replace('.content.content', '.content')}.{kind}"
    where = f"{path}.{'source' if kind == 'image' else 'image_url'}"
    try:
        data, url = _source(part.get("source"), where) if kind == "image" else _image_url(part, path)
    except PydanticCustomError:
        if answered:
            raise
        note(told, f"the model reads {UNSEEN!r} in the place of an earlier picture")
        return {"type": "text", "text": UNSEEN}
    return {"type": "text", "text": add_picture(GivenPicture(f"{field}.{where}", data, url, answered, told))}


def bare_picture(data: JsonValue, field: str, path: str, *, answered: bool) -> str:
    """Returns the mark of a file in base64, which may be a data: URL."""
    if not isinstance(data, str):
        raise invalid("must be a picture in base64", path)
    found = _url(data, path)[0] if data.startswith("data:") else data
    return add_picture(GivenPicture(f"{field}.{path}", found, "", answered, _names(field, path)))


def _names(field: str, path: str) -> str:
    """The path without the places in lists."""
    return ".".join(each for each in (field, *path.split(".")) if not each.isdecimal())


def _image_url(part: dict[str, JsonValue], path: str) -> tuple[str, str]:
    """OpenAI's forms: an address, or an object that has it."""
    value = part.get("image_url")
    given = value.get("url") if isinstance(value, dict) else value
    if given is None and part.get("file_id") is not None:
        raise unsupported("no file of another server can be read; send a data: URL", f"{path}.file_id")
    return _url(given, f"{path}.image_url")


def _source(source: JsonValue, where: str) -> tuple[str, str]:
    """Anthropic's form: base64 with a type, or an address."""
    kind = source.get("type") if isinstance(source, dict) else None
    if not isinstance(source, dict) or kind not in ("base64", "url"):
        raise unsupported("must be of type 'base64' or 'url'", f"{where}.type")
    if kind == "url":
        return _url(source.get("url"), f"{where}.url")
    data = source.get("data")
    _check_type(source.get("media_type"), f"{where}.media_type")
    if not isinstance(data, str):
        raise invalid("must be a picture in base64", f"{where}.data")
    return data, ""


def _url(url: JsonValue, where: str) -> tuple[str, str]:
    """Returns the base64 of a data: URL, or any other address."""
    if not isinstance(url, str):
        raise invalid('must be a data: URL, such as "data:image/png;base64,…"', where)
    if not url.startswith("data:"):
        if not url.startswith(("http://", "https://")):
            raise unsupported(f"must be a data: or http URL (got {url[:80]!r})", where)
        return "", url
    head, comma, data = url[len("data:") :].partition(",")
    kind, *attributes = head.split(";")
    if not comma or "base64" not in attributes:
        raise invalid("a data: URL must have its content in base64", where)
    _check_type(kind, where)
    return data, ""


def _check_type(kind: JsonValue, where: str) -> None:
    if kind not in _TYPES:
        accepted = "image/png, image/jpeg, image/webp and image/gif"
        raise unsupported(f"accepted types are {accepted} (got {str(kind)[:80]!r})", where)
