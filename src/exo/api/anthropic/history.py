"""Makes text of the blocks in Anthropic's conversations that no local model can read, so that a session can continue.

An agent cannot take a block out of its history again. Only what the reply is to answer stays as it is, and is refused
where it cannot be read.
"""

from collections.abc import Sequence

from pydantic import JsonValue

from exo.api.http.body import note
from exo.api.http.picture_parts import picture_text
from exo.serving.pictures.prompt_pictures import UNSEEN

_NOTHING: JsonValue = {"type": "thinking", "thinking": ""}
"""Replaces a dropped block, so that the others keep their numbers."""
_LEFT_OUT = ("redacted_thinking", "server_tool_use", "mcp_tool_use", "mcp_tool_result", "compaction")


def readable(messages: JsonValue) -> JsonValue:
    """Replaces the blocks that only Anthropic's models can read."""
    if not isinstance(messages, list):
        return messages
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    newest = max((at for at, role in enumerate(roles) if role == "user"), default=-1)
    return [_message(message, f"{at}.content", newest=at == newest) for at, message in enumerate(messages)]


def _message(message: JsonValue, path: str, *, newest: bool) -> JsonValue:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(content, list):
        return message
    own = message.get("role") == "assistant"
    answered = [newest and _is_answered(content, at) for at in range(len(content))]
    blocks = [
        _block(each, f"{path}.{at}", own, due) for at, (each, due) in enumerate(zip(content, answered, strict=True))
    ]
    return {**message, "content": blocks}


def _is_answered(content: Sequence[JsonValue], at: int) -> bool:
    """Whether the reply answers this block of the newest message: all but tool results that are followed by others."""
    return _kind(content[at]) != "tool_result" or all(_kind(each) == "tool_result" for each in content[at:])


def _block(block: JsonValue, path: str, own: bool, answered: bool) -> JsonValue:
    kind = _kind(block)
    if not isinstance(block, dict):
        return block
    if own and (kind in _LEFT_OUT or (kind.endswith("_tool_result"))):
        note(f"messages.content.{kind}", "is left out, since only Anthropic's models read it")
        return _NOTHING
    content = block.get("content")
    if kind == "tool_result" and isinstance(content, list):
        return {**block, "content": [_part(each, f"{path}.content.{at}", answered) for at, each in enumerate(content)]}
    return block if own and kind == "image" else _part(block, path, answered)


def _part(part: JsonValue, path: str, answered: bool) -> JsonValue:
    """One part of the user's text or of a result. Pictures become marks."""
    if not isinstance(part, dict):
        return part
    match _kind(part):
        case "tool_reference":
            return _text(f"[tool {part.get('tool_name')}]")
        case "search_result":
            return _text(_lines(part.get("title"), part.get("source"), *_texts(part.get("content"))))
        case "document" if (texts := _document(part)) is not None:
            return _text(_lines(part.get("title"), part.get("context"), *texts))
        case "image":
            return picture_text(part, "messages", path, answered=answered)
        case "document" if not answered:
            note("messages.content.document", f"the model reads {UNSEEN!r} in its place")
            return _text(UNSEEN)
        case _:
            return part


def _document(part: dict[str, JsonValue]) -> list[str] | None:
    """The texts of a document that only has text."""
    source = part.get("source")
    if not isinstance(source, dict):
        return None
    if source.get("type") == "text" and isinstance(data := source.get("data"), str):
        return [data]
    content = source.get("content")
    if source.get("type") != "content" or not isinstance(content, str | list):
        return None
    if isinstance(content, list) and any(_kind(each) != "text" for each in content):
        return None
    return _texts(content)


def _texts(content: JsonValue) -> list[str]:
    if isinstance(content, str):
        return [content]
    blocks = content if isinstance(content, list) else []
    return [str(each.get("text", "")) for each in blocks if isinstance(each, dict)]


def _lines(*texts: JsonValue) -> str:
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def _text(text: str) -> JsonValue:
    return {"type": "text", "text": text}


def _kind(block: JsonValue) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    return kind if isinstance(kind, str) else ""
