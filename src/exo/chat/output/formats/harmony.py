"""The harmony format of gpt-oss, in which every message of a reply has a header.

Published in the repository openai/harmony (docs/format.md): channel "analysis" is reasoning, "final" is the answer, and
"commentary" with a recipient such as ``to=functions.get_weather`` is a call. A reply begins inside a header.
"""

import re
from collections.abc import Sequence

from exo.chat.grammar.builder import GrammarBuilder
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.events import Reasoning
from exo.chat.output.format import OutputFormat
from exo.chat.output.parser import Prose, ReplyState, Thinking, skip
from exo.chat.output.scanner import Steps, markers

_START, _CHANNEL, _MESSAGE, _END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
_ENDS = markers(_END, "<|call|>", "<|return|>", _START)
_HEADER_ENDS = markers(_MESSAGE, *_ENDS.texts)
_FUNCTION = re.compile(r"\bto=(functions\.)?([^\s<]+)")
_REASONING = re.compile(r"<\|channel\|>\s*analysis")
_THINKING = Thinking(f"{_CHANNEL}analysis{_MESSAGE}", _END)


def _read(reply: ReplyState, in_reasoning: bool) -> Steps[None]:
    scanner = reply.scanner
    reply.content.marker()
    thoughts = Prose(Reasoning, trim=True)
    end = (yield from _read_prose(reply, thoughts)) if in_reasoning else _END
    while end:
        scanner.hold("" if end != _START else _START)
        yield from scanner.space()
        if end != _START and not (yield from scanner.either(_START, _CHANNEL, "to=")):
            if scanner.at_end:
                if not (held := scanner.release()).startswith("<|"):
                    yield reply.content.add(held)
                return
            yield reply.content.add(scanner.release())
            end = yield from _read_prose(reply, reply.content)  # a message without a header
            continue
        end = yield from scanner.until(_HEADER_ENDS, skip)
        header = scanner.release()
        if end != _MESSAGE:
            if not end and "<|" not in header:
                yield reply.content.add(header)  # not a header after all
                yield reply.content.finish()
            continue
        function = _FUNCTION.search(header) if reply.calls_allowed else None
        if function is not None and (function[1] or reply.knows(function[2])):
            end = yield from _read_call(reply, function[2], header)
        else:
            end = yield from _read_prose(reply, thoughts if _REASONING.search(header) else reply.content)


def _read_call(reply: ReplyState, name: str, header: str) -> Steps[str]:
    """Reads a call after its header, and returns the marker at the end."""
    scanner = reply.scanner
    yield from scanner.space()
    if (yield from scanner.peek()) == "{":
        reply.open(header)
        whole = yield from reply.call_in_json(name)
        yield from reply.end(whole=whole)
        if whole:
            yield from scanner.space()
            if (end := (yield from scanner.either(*_ENDS.texts))) or scanner.at_end:
                return end
    return (yield from _read_prose(reply, reply.content))


def _read_prose(reply: ReplyState, prose: Prose) -> Steps[str]:
    """Reads to the end of a message, and returns the marker there."""
    end = yield from reply.scanner.until(_ENDS, prose.add)
    if end:
        prose.paragraph()
    else:
        yield prose.finish()
    return end


def _write_frame(grammar: GrammarBuilder, in_reasoning: bool, calls: bool) -> str:
    before = "" if in_reasoning else grammar.marked(_THINKING.begin)
    thought = grammar.sequence(before, grammar.text_until(_END), grammar.marked(f"{_START}assistant"))
    thought += "" if in_reasoning else "?"
    return grammar.sequence(thought, "" if calls else grammar.marked(f"{_CHANNEL}final{_MESSAGE}"))


def _write(grammar: GrammarBuilder, tools: Sequence[Tool], parallel: bool) -> str:
    """Returns the expression of one call, even if more are allowed: the end of a call ends the reply."""
    return grammar.call(tools, f"{_CHANNEL}commentary to=functions.NAME <|constrain|>json{_MESSAGE}ARGUMENTS")


FORMATS = (
    OutputFormat(
        "harmony", special=True, thinking=_THINKING, read_reply=_read, write_calls=_write, write_frame=_write_frame
    ),
)
