"""The harmony format of gpt-oss, in which every message of a reply has a header that says what it is.

Published in the repository openai/harmony (docs/format.md): channel "analysis" is reasoning, "final" is for the user,
and "commentary" with a recipient such as ``to=functions.get_weather`` is a call. A reply begins inside the header.
"""

import re
from collections.abc import Sequence

from exo.chat.grammar.builder import Grammar
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.events import Reasoning
from exo.chat.output.format import OutputFormat
from exo.chat.output.parser import Prose, Reply, Thinking
from exo.chat.output.scanner import Steps, markers

_START, _CHANNEL, _MESSAGE, _END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
_ENDS = markers(_END, "<|call|>", "<|return|>", _START)
_HEADER_ENDS = markers(_MESSAGE, *_ENDS.texts)
_FUNCTION = re.compile(r"\bto=(functions\.)?([^\s<]+)")
_REASONING = re.compile(r"<\|channel\|>\s*analysis")
_THINKING = Thinking(f"{_CHANNEL}analysis{_MESSAGE}", _END)


def _read(reply: Reply, in_reasoning: bool) -> Steps[None]:
    scanner = reply.scanner
    reply.content.marker()
    thoughts = Prose(Reasoning, trim=True)
    end = (yield from _prose(reply, thoughts)) if in_reasoning else _END
    while end:
        scanner.hold("" if end != _START else _START)
        yield from scanner.space()
        if end != _START and not (yield from scanner.either(_START, _CHANNEL, "to=")):
            if scanner.at_end:
                if not (held := scanner.release()).startswith("<|"):
                    yield reply.content.add(held)
                return
            yield reply.content.add(scanner.release())
            end = yield from _prose(reply, reply.content)  # without a header
            continue
        end = yield from scanner.until(_HEADER_ENDS, _nothing)
        header = scanner.release()
        if end != _MESSAGE:
            if not end and "<|" not in header:
                yield reply.content.add(header)  # no header after all
                yield reply.content.finish()
            continue
        function = _FUNCTION.search(header) if reply.calls_allowed else None
        if function is not None and (function[1] or reply.knows(function[2])):
            end = yield from _call(reply, function[2], header)
        elif _REASONING.search(header):
            end = yield from _prose(reply, thoughts)
        else:
            end = yield from _prose(reply, reply.content)


def _call(reply: Reply, name: str, header: str) -> Steps[str]:
    """Reads on behind a call's header, and returns the marker at the end."""
    scanner = reply.scanner
    yield from scanner.space()
    if (yield from scanner.peek()) == "{":
        reply.open(header)
        yield reply.call(name)
        whole = yield from reply.json_arguments()
        yield from reply.end(whole=whole)
        if whole:
            yield from scanner.space()
            if (end := (yield from scanner.either(*_ENDS.texts))) or scanner.at_end:
                return end
    return (yield from _prose(reply, reply.content))


def _prose(reply: Reply, prose: Prose) -> Steps[str]:
    """Reads to the end of a message, and returns the marker there."""
    end = yield from reply.scanner.until(_ENDS, prose.add)
    if end:
        prose.paragraph()
    else:
        yield prose.finish()
    return end


def _nothing(text: str) -> None:
    """A header is read only to be held."""


def _write_frame(grammar: Grammar, in_reasoning: bool, calls: bool) -> str:
    go_on = grammar.marked(f"{_START}assistant")
    if in_reasoning:
        thought = grammar.sequence(grammar.text_until(_END), go_on)
    else:
        thought = grammar.sequence(grammar.marked(_THINKING.begin), grammar.text_until(_END), go_on) + "?"
    return grammar.sequence(thought, "" if calls else grammar.marked(f"{_CHANNEL}final{_MESSAGE}"))


def _write(grammar: Grammar, tools: Sequence[Tool], parallel: bool) -> str:
    """One call, however many are allowed: what ends it ends the reply."""
    return grammar.one_of(
        [
            grammar.sequence(
                grammar.marked(f"{_CHANNEL}commentary"),
                grammar.plain(f" to=functions.{tool.name} "),
                grammar.marked(f"<|constrain|>json{_MESSAGE}"),
                grammar.json(tool.schema),
            )
            for tool in tools
        ]
    )


HARMONY = OutputFormat(
    "harmony", special=True, thinking=_THINKING, read_reply=_read, write_calls=_write, write_frame=_write_frame
)
