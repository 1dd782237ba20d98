"""The format of Hermes and of Qwen 2.5 and 3: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``.

Published in the repository NousResearch/Hermes-Function-Calling and in the chat templates of Qwen 2.5 and 3.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from exo.chat.grammar.builder import Grammar
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.format import OutputFormat
from exo.chat.output.json_call import json_call, write_json_call
from exo.chat.output.parser import Reply
from exo.chat.output.scanner import Steps

_BRACES = re.compile(r"[\s}]*")
_BEGIN, _END = "<tool_call>", "</tool_call>"


def _read(reply: Reply, marker: str) -> Steps[bool]:
    yield from reply.scanner.space()
    if not (yield from json_call(reply, marked=bool(marker))):
        return False
    yield from reply.scanner.run(_BRACES)  # some models write one too many
    yield from reply.scanner.either(_END)  # some models forget it
    return True


def _write(grammar: Grammar, tools: Sequence[Tool], parallel: bool) -> str:
    call = grammar.sequence(grammar.marked(_BEGIN + "\n"), write_json_call(grammar, tools), grammar.marked("\n" + _END))
    return grammar.several(call, "\n", parallel)


HERMES = OutputFormat("hermes", begin=(_BEGIN,), read_call=_read, write_calls=_write)
ERNIE = replace(HERMES, name="ernie", opening=("<response>",), frame=("</response>",))
"""The same of ERNIE 4.5, whose content has tags of its own."""
