"""The growing output items of a response: reasoning, messages and calls, and the events about them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue

from exo.api.openai.response import call_id, choice_logprobs
from exo.api.openai.responses.tools import OfferedTool, custom_input
from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.worker.protocol.events import TokenLogprobs

Tell = Callable[[str, dict[str, JsonValue]], bytes]
"""Makes an event of a type and its fields."""
_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc", "custom_tool_call": "ctc"}
_Kind = Literal["reasoning", "message", "function_call", "custom_tool_call"]


@dataclass(slots=True)
class Item:
    """One output item. ``text`` grows: it is the reasoning, the content or the arguments."""

    id: str
    type: _Kind
    call_id: str = ""
    name: str = ""
    """The name by which the model called the tool."""
    tool: OfferedTool | None = None
    """The called tool, if it is one of the request's."""
    text: str = ""
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])

    def part(self) -> dict[str, JsonValue]:
        """Its content part."""
        if self.type == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        part: dict[str, JsonValue] = {"type": "output_text", "text": self.text, "annotations": []}
        return {**part, "logprobs": _logprobs(self.logprobs)} if self.logprobs else part

    def wire(self, *, empty: bool = False) -> dict[str, JsonValue]:
        """The item in its present state, or with ``empty`` in its first."""
        common: dict[str, JsonValue] = {"id": self.id, "type": self.type, "status": self.status}
        match self.type:
            case "function_call" | "custom_tool_call":
                call: dict[str, JsonValue] = {
                    "call_id": self.call_id,
                    "name": self.tool.name if self.tool else self.name,
                }
                if self.type == "custom_tool_call":
                    call["input"] = "" if empty else custom_input(self.text)
                else:
                    call["arguments"] = "" if empty else self.text
                if self.tool is not None and self.tool.namespace is not None:
                    call["namespace"] = self.tool.namespace
                return {**common, **call}
            case "reasoning":
                return {**common, "summary": [], "content": [] if empty else [self.part()]}
            case "message":
                return {**common, "role": "assistant", "content": [] if empty else [self.part()]}


def _logprobs(items: list[TokenLogprobs]) -> JsonValue:
    return [each.model_dump() for each in choice_logprobs(items).content]


class OutputItems:
    """The items of one response in order. ``tell`` makes the events, which only a stream uses."""

    def __init__(self, response_id: str, tell: Tell, tools: Iterable[OfferedTool] = ()) -> None:
        self.items: list[Item] = []
        self._id = response_id
        self._tell = tell
        self._tools = {each.tool.name: each for each in tools}
        self._calls: dict[int, Item] = {}

    def add(self, part: Part, logprobs: tuple[TokenLogprobs, ...] = ()) -> bytes:
        """Takes the next part of the reply."""
        match part:
            case Content(text):
                return self._text("message", text, logprobs)
            case Reasoning(text):
                return self._text("reasoning", text, ())
            case ToolCall(index, name):
                data = self.close()
                tool = self._tools.get(name)
                item = self._new("custom_tool_call" if tool is not None and tool.custom else "function_call")
                item.tool, item.name, item.call_id = tool, name, f"call_{call_id(self._id, 0, index)}"
                self._calls[index] = item
                return data + self._added(item)
            case Arguments(index, text):
                item = self._calls[index]
                item.text += text
                if item.type == "custom_tool_call":
                    return b""  # its input is told when all of it is there, since the arguments are JSON around it
                return self._event("response.function_call_arguments.delta", item, {"delta": text})
            case BrokenCall():
                return self.close(complete=False)

    def close(self, *, complete: bool = True) -> bytes:
        """Ends the last item. ``complete`` is false if the output was cut off or is a broken call."""
        if not self.items or self.items[-1].status != "in_progress":
            return b""
        item = self.items[-1]
        item.status = "completed" if complete else "incomplete"
        done: dict[str, JsonValue] = {"output_index": len(self.items) - 1, "item": item.wire()}
        if item.type == "function_call":
            arguments: dict[str, JsonValue] = {"arguments": item.text}
            data = self._event("response.function_call_arguments.done", item, arguments) if complete else b""
        elif item.type == "custom_tool_call":
            given = custom_input(item.text)
            data = self._event("response.custom_tool_call_input.delta", item, {"delta": given}) if given else b""
            if complete:
                data += self._event("response.custom_tool_call_input.done", item, {"input": given})
        else:
            where: dict[str, JsonValue] = {"content_index": 0}
            kind = "response.reasoning_text.done"
            text: dict[str, JsonValue] = {**where, "text": item.text}
            if item.type == "message":
                kind, text["logprobs"] = "response.output_text.done", _logprobs(item.logprobs)
            data = self._event(kind, item, text)
            data += self._event("response.content_part.done", item, {**where, "part": item.part()})
        return data + self._tell("response.output_item.done", done)

    def _text(self, kind: Literal["reasoning", "message"], text: str, logprobs: tuple[TokenLogprobs, ...]) -> bytes:
        data = b""
        if not self.items or self.items[-1].type != kind or self.items[-1].status != "in_progress":
            data = self.close()
            item = self._new(kind)
            part: dict[str, JsonValue] = {"content_index": 0, "part": item.part()}
            data += self._added(item) + self._event("response.content_part.added", item, part)
        item = self.items[-1]
        item.text += text
        item.logprobs += logprobs
        delta: dict[str, JsonValue] = {"content_index": 0, "delta": text}
        if kind == "reasoning":
            return data + self._event("response.reasoning_text.delta", item, delta)
        return data + self._event("response.output_text.delta", item, {**delta, "logprobs": _logprobs([*logprobs])})

    def _new(self, kind: _Kind) -> Item:
        item = Item(f"{_PREFIXES[kind]}_{self._id.removeprefix('resp_')}{len(self.items)}", kind)
        self.items.append(item)
        return item

    def _added(self, item: Item) -> bytes:
        fields: dict[str, JsonValue] = {"output_index": len(self.items) - 1, "item": item.wire(empty=True)}
        return self._tell("response.output_item.added", fields)

    def _event(self, kind: str, item: Item, fields: dict[str, JsonValue]) -> bytes:
        return self._tell(kind, {"item_id": item.id, "output_index": self.items.index(item), **fields})
