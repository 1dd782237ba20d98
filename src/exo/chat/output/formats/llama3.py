"""The JSON calls of Llama 3.1 to 4: ``{"name": …, "parameters": {…}}``, perhaps after ``<|python_tag|>``.

Published in Meta's repository llama-models (models/llama3_1/prompt_format.md and its successors). The object is the
whole reply; where there are several, ";" is between them. The models also write a sentence before it.
"""

from collections.abc import Sequence
from dataclasses import replace

from exo.chat.grammar.builder import Grammar
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.format import OutputFormat
from exo.chat.output.json_call import closing_json_calls, json_call, write_json_call
from exo.chat.output.parser import Reply
from exo.chat.output.scanner import Steps

_BEGIN = "<|python_tag|>"


def _read(reply: Reply, marker: str) -> Steps[bool]:
    scanner = reply.scanner
    yield from scanner.space()
    while (yield from json_call(reply, marked=bool(marker))):
        reply.next_call()
        yield from scanner.space()
        yield from scanner.either(";")
        yield from scanner.space()
    return False


def _write(grammar: Grammar, tools: Sequence[Tool], parallel: bool) -> str:
    return grammar.several(write_json_call(grammar, tools, "parameters"), "; ", parallel)


LLAMA3 = OutputFormat(
    "llama3",
    special=True,
    begin=(_BEGIN,),
    read_call=_read,
    read_bare=_read,
    closing_calls=closing_json_calls,
    write_calls=_write,
)
LLAMA4 = replace(LLAMA3, name="llama4", begin=("<|python_start|>",), frame=("<|python_end|>",))
