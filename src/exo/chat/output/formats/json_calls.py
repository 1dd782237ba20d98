"""The formats whose calls have their arguments as a JSON object. Each is published with its models.

Most write an array of objects ``{"name": …, "arguments": {…}}`` between two markers: Mistral (mistralai/mistral-common,
tokenizers v3 and v7), xLAM and others. Hermes and Qwen (NousResearch/Hermes-Function-Calling) put each object between
markers; Llama 3.1 to 4 (meta-llama/llama-models) write objects without markers, separated by ";". Cohere and Apertus
have other keys. Functionary, DeepSeek V3 and R1, Kimi K2 and Mistral's tokenizers from v11 on write the name outside of
the JSON.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from exo.chat.grammar.builder import GrammarBuilder
from exo.chat.grammar.tool_schema import LONGEST_NAME, Tool
from exo.chat.output.format import OutputFormat, WriteCalls
from exo.chat.output.json_call import json_call, json_string
from exo.chat.output.parser import ReplyState, Thinking
from exo.chat.output.scanner import Steps

_NAMED = '{"name": "NAME", "arguments": ARGUMENTS}'
_ARRAY, _LINES, _SINGLE = ("[", ", ", "]"), ("\n", "\n", "\n"), ("", None, "")
_NAME = re.compile(r"[^\s<>{}\[\]\"`]*")


def _writer(begin: str, call: str, between: str | None, end: str) -> WriteCalls:
    """Returns the writer of calls with ``between`` them, or of one call only if ``between`` is None.

    ``call`` is the syntax of a call, as for ``GrammarBuilder.call``.
    """

    def write(grammar: GrammarBuilder, tools: Sequence[Tool], parallel: bool) -> str:
        calls = grammar.several(grammar.call(tools, call), between or "", parallel and between is not None)
        return grammar.sequence(grammar.marked(begin), calls, grammar.marked(end))

    return write


# --- objects between two markers, in an array or one after the other ---


def _read_objects(
    reply: ReplyState, marker: str, *, end: str, read_object: Callable[[ReplyState, bool], Steps[bool]]
) -> Steps[bool]:
    """Reads on after ``marker``. Without a marker, at the beginning of a reply, only an array counts."""
    scanner = reply.scanner
    yield from scanner.space()
    listed = yield from scanner.either("[")
    if not marker and not listed:
        return False
    while True:
        yield from scanner.space()
        if not (yield from read_object(reply, bool(marker))):
            return False
        yield from scanner.space()
        comma = yield from scanner.either(",")
        yield from scanner.space()
        if (yield from scanner.peek()) != "{":
            break
        reply.next_call(comma)
    if listed:
        yield from scanner.either("]")
        yield from scanner.space()
    if end:
        yield from scanner.either(end)
    return True


def _read_keyed(reply: ReplyState, marked: bool) -> Steps[bool]:
    """Reads ``{"get_weather": {…}}``."""
    scanner = reply.scanner
    if not (yield from scanner.either("{")):
        return False
    yield from scanner.space()
    name = yield from json_string(scanner)
    yield from scanner.space()
    if not name or not (yield from scanner.either(":")) or not (yield from reply.call_in_json(name)):
        return False
    yield from scanner.space()
    yield from scanner.either("}")
    return True


def _read_function(reply: ReplyState, marked: bool) -> Steps[bool]:
    """Reads ``get_weather>{…}``."""
    name = yield from reply.scanner.run(_NAME, LONGEST_NAME)
    return bool((yield from reply.scanner.either(">"))) and (yield from reply.call_in_json(name))


def _objects(
    name: str,
    begin: str,
    end: str = "",
    call: str = _NAMED,
    *,
    written: tuple[str, str | None, str] = _ARRAY,
    read: Callable[[ReplyState, bool], Steps[bool]] = json_call,
    special: bool = False,
    thinking: Thinking | None = None,
    opening: tuple[str, ...] = (),
    frame: tuple[str, ...] = (),
) -> OutputFormat:
    """Returns a format. ``written`` is the text before, between and after the objects inside the markers."""
    opened, between, closed = written
    return OutputFormat(
        name,
        special=special,
        thinking=thinking,
        opening=opening,
        frame=frame,
        begin=(begin,) if begin else (),
        stray=(end,) if special and end else (),
        read_calls=partial(_read_objects, end=end, read_object=read),
        bare=not begin,
        write_calls=_writer(begin + opened, call, between, closed + end),
    )


UNKNOWN = replace(_objects("unknown", ""), known=False)
"""Plain JSON, for a call that a grammar forces on a model of an unknown format."""


# --- an object for each call ---


def _read_hermes(reply: ReplyState, marker: str) -> Steps[bool]:
    yield from reply.scanner.space()
    if not (yield from json_call(reply, bool(marker))):
        return False
    yield from reply.scanner.run(_BRACES)  # some models write a superfluous one
    yield from reply.scanner.either("</tool_call>")  # some models forget it
    return True


_BRACES = re.compile(r"[\s}]*")
_HERMES = OutputFormat(
    "hermes",
    begin=("<tool_call>",),
    read_calls=_read_hermes,
    write_calls=_writer("", f"<tool_call>\n{_NAMED}\n</tool_call>", "\n", ""),
)


def _read_llama(reply: ReplyState, marker: str) -> Steps[bool]:
    scanner = reply.scanner
    yield from scanner.space()
    while (yield from json_call(reply, bool(marker))):
        reply.next_call()
        yield from scanner.space()
        yield from scanner.either(";")
        yield from scanner.space()
    return False


_LLAMA3 = OutputFormat(
    "llama3",
    special=True,
    begin=("<|python_tag|>",),
    read_calls=_read_llama,
    bare=True,
    closing_json=True,
    write_calls=_writer("", '{"name": "NAME", "parameters": ARGUMENTS}', "; ", ""),
)


# --- the name outside of the JSON ---


def _read_mistral(reply: ReplyState, marker: str) -> Steps[bool]:
    """Reads Mistral's old format, an array, or the new one. Some of its tokenizers write an id after the name."""
    scanner = reply.scanner
    yield from scanner.space()
    if (yield from scanner.peek()) == "[":
        return (yield from _read_objects(reply, marker, end="", read_object=json_call))
    name = yield from scanner.run(_NAME, LONGEST_NAME)
    if (yield from scanner.either("[ARGS]", "[CALL_ID]")) == "[CALL_ID]":
        yield from scanner.run(_NAME, LONGEST_NAME)
        yield from scanner.either("[ARGS]")
    return (yield from reply.call_in_json(name))


_MISTRAL = OutputFormat(
    "mistral", special=True, begin=("[TOOL_CALLS]",), stray=("[/TOOL_CALLS]",), read_calls=_read_mistral
)


@dataclass(frozen=True, slots=True)
class _Section:
    """Calls between ``begin`` and ``end``, all in a section, with ``separator`` between name and arguments.

    DeepSeek V3 and R1 write "function" as the name, then the name and the arguments in a fenced block.
    """

    section: str
    section_end: str
    begin: str
    separator: str
    end: str
    ids: bool = False
    """Whether names are written as ids such as ``functions.get_weather:0``."""

    def format(self, name: str, call: str, between: str = "") -> OutputFormat:
        """Returns a format whose calls are written as ``call`` between ``begin`` and ``end``."""
        return OutputFormat(
            name,
            special=True,
            begin=(self.section, self.begin),
            stray=(self.section_end, self.end),
            read_calls=self._read,
            write_calls=_writer(self.section, self.begin + call + self.end, between, self.section_end),
        )

    def _read(self, reply: ReplyState, marker: str) -> Steps[bool]:
        call = partial(self._call, reply)
        return (yield from reply.several(self.begin, self.section_end, call, begun=marker == self.begin))

    def _call(self, reply: ReplyState) -> Steps[bool]:
        scanner = reply.scanner
        yield from scanner.space()
        name = yield from scanner.run(_NAME, LONGEST_NAME)
        yield from scanner.space()
        if not (yield from scanner.either(self.separator)):
            return False
        yield from scanner.space()
        if name == "function" and (yield from scanner.peek()) != "{":
            name = yield from scanner.run(_NAME, LONGEST_NAME)
            yield from scanner.space()
            yield from scanner.either("```json")
        if not (yield from reply.call_in_json(_ID.sub("", name) if self.ids else name)):
            return False
        yield from scanner.space()
        yield from scanner.either("```")
        yield from scanner.space()
        yield from scanner.either(self.end)
        return True


_ID = re.compile(r"^functions\.|:[0-9]+$")
_BAR = "\uff5c"
_DEEPSEEK = _Section(
    section=f"<{_BAR}tool▁calls▁begin{_BAR}>",
    section_end=f"<{_BAR}tool▁calls▁end{_BAR}>",
    begin=f"<{_BAR}tool▁call▁begin{_BAR}>",
    separator=f"<{_BAR}tool▁sep{_BAR}>",
    end=f"<{_BAR}tool▁call▁end{_BAR}>",
)
_KIMI = _Section(
    section="<|tool_calls_section_begin|>",
    section_end="<|tool_calls_section_end|>",
    begin="<|tool_call_begin|>",
    separator="<|tool_call_argument_begin|>",
    end="<|tool_call_end|>",
    ids=True,
)

FORMATS = (
    _objects(
        "apertus",
        "<|tools_prefix|>",
        "<|tools_suffix|>",
        '{"NAME": ARGUMENTS}',
        read=_read_keyed,
        special=True,
        thinking=Thinking("<|inner_prefix|>", "<|inner_suffix|>"),
    ),
    _objects(
        "apriel",
        "<tool_calls>",
        "</tool_calls>",
        thinking=Thinking("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
        frame=("[END FINAL RESPONSE]",),
    ),
    _objects(
        "cohere",
        "<|START_ACTION|>",
        "<|END_ACTION|>",
        '{"tool_call_id": "INDEX", "tool_name": "NAME", "parameters": ARGUMENTS}',
        written=("[\n    ", ",\n    ", "\n]"),
        special=True,
        thinking=Thinking("<|START_THINKING|>", "<|END_THINKING|>"),
        opening=("<|START_RESPONSE|>", "<|START_TEXT|>"),
        frame=("<|END_RESPONSE|>", "<|END_TEXT|>"),
    ),
    _objects(
        "command-r",
        "Action:\n```json",
        "```",
        '{\n    "tool_name": "NAME",\n    "parameters": ARGUMENTS\n}',
        written=("\n[\n", ",\n", "\n]"),
    ),
    _DEEPSEEK.format("deepseek-v3", f"function{_DEEPSEEK.separator}NAME\n```json\nARGUMENTS\n```", "\n"),
    _DEEPSEEK.format("deepseek-v3.1", f"NAME{_DEEPSEEK.separator}ARGUMENTS"),
    replace(_HERMES, name="ernie", opening=("<response>",), frame=("</response>",)),
    _objects("function", "<function=", "</function>", "NAME>ARGUMENTS", written=_SINGLE, read=_read_function),
    _objects(
        "gigachat3",
        "function call<|role_sep|>",
        written=("\n", None, ""),
        special=True,
        frame=("<|message_sep|>",),
    ),
    _objects("gigachat3.1", "<|function_call|>", written=_SINGLE, special=True, frame=("<|message_sep|>",)),
    _objects(
        "granite3",
        "<|tool_call|>",
        "<|/tool_call|>",
        special=True,
        opening=("<response>",),
        frame=("</response>",),
    ),
    _HERMES,
    _objects(
        "hunyuan",
        "<tool_calls>",
        "</tool_calls>",
        thinking=Thinking("<think>", "</think>"),
        opening=("<answer>",),
        frame=("</answer>",),
    ),
    _KIMI.format("kimi", f"functions.NAME:INDEX{_KIMI.separator}ARGUMENTS"),
    _LLAMA3,
    replace(_LLAMA3, name="llama4", begin=("<|python_start|>",), frame=("<|python_end|>",)),
    _objects(
        "longcat",
        "<longcat_tool_call>",
        "</longcat_tool_call>",
        written=_LINES,
        thinking=Thinking("<longcat_think>", "</longcat_think>"),
    ),
    _objects("minimax-m1", "<tool_calls>", "</tool_calls>", written=_LINES),
    replace(_MISTRAL, write_calls=_writer("", "[TOOL_CALLS]NAME[ARGS]ARGUMENTS", "", "")),
    replace(_MISTRAL, name="mistral-array", write_calls=_writer("[TOOL_CALLS][", _NAMED, ", ", "]")),
    _objects("nemotron", "<TOOLCALL>", "</TOOLCALL>"),
    _objects("tool-calls", "<tool_calls>", "</tool_calls>"),
    _objects("xlam", ""),
)
