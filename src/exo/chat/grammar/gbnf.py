"""GBNF, llama.cpp's notation for grammars, in llguidance's: ``python -m exo.chat.grammar.gbnf`` and whoever asks it.

The conversion is a parser in Python, and what it is given comes from a client: so it runs in a process that can be
ended. One JSON object a line in (``source``), one a line out: ``lark``, or ``error``.
"""

import json
import re

from llguidance.gbnf_to_lark import gbnf_to_lark

from exo.chat.template.sandbox import LimitedError, LimitedProcesses
from exo.chat.template.sandbox_main import serve

SECONDS = 1
"""Wall time one grammar may take."""
_ANSWER_LIMIT = 64 << 20
"""Bytes of one answer line."""

_QUOTED = re.compile(r'#[^\r\n]*|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]', re.DOTALL)
"""Comments, literals and classes of characters."""
_SPECIAL = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\([\[\]])|\\.|([&~\n])", re.DOTALL)
"""In those: other escapes, and what means something else in Lark, such as "&&" in a class."""


class GbnfError(Exception):
    """No grammar that can be used; the message says why."""


class GbnfWorker:
    """A few processes, started when first needed and replaced when they die or are late."""

    def __init__(self) -> None:
        self._processes = LimitedProcesses("exo.chat.grammar.gbnf", seconds=SECONDS, answer_limit=_ANSWER_LIMIT)

    async def lark(self, source: str) -> str:
        """The grammar in Lark. Raises ``GbnfError`` and ``LimitedBusyError``."""
        try:
            answer = await self._processes.ask({"source": source})
        except LimitedError as error:
            raise GbnfError(f"reading it {error}") from None
        if "error" in answer:
            raise GbnfError(answer["error"])
        return answer["lark"]

    async def aclose(self) -> None:
        """Ends the processes, which have nothing to lose."""
        await self._processes.aclose()


def converted(line: bytes) -> dict[str, str]:
    """The answer to one request line."""
    try:
        return {"lark": gbnf_to_lark(_QUOTED.sub(_readable, json.loads(line)["source"]))}
    except Exception as error:  # noqa: BLE001, it raises that itself, as well as whatever its own parser trips over
        return {"error": f"it is no GBNF: {error}"[:300]}


def _readable(quoted: re.Match[str]) -> str:
    """A comment as it is, a literal or a class of characters in escapes that mean the same in Lark."""
    return quoted[0] if quoted[0].startswith("#") else _SPECIAL.sub(_escaped, quoted[0])


def _escaped(special: re.Match[str]) -> str:
    digits, character = special[1] or special[2] or special[3], special[4] or special[5]
    if not digits and not character:
        return special[0]
    code = int(digits, 16) if digits else ord(character)
    if 0xD800 <= code < 0xE000:
        raise ValueError(f"there is no character {special[0]}")
    return f"\\x{code:02x}" if code < 0x100 else chr(code)


if __name__ == "__main__":
    serve(converted, seconds=SECONDS, address_space=512 << 20)
