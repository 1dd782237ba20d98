"""Translates GBNF, llama.cpp's notation for grammars, to Lark, llguidance's, in a sandbox.

The translator is a parser written in Python, and its input comes from clients. A request of the sandbox program has the
``source``; the answer has ``lark`` or ``error``.
"""

import json
import re

from llguidance.gbnf_to_lark import gbnf_to_lark

from exo.chat.sandbox_pool import SandboxPool
from exo.worker.runner_common.sandbox import SandboxError, SandboxLimits, serve

_LIMITS = SandboxLimits(seconds=10, address_space=512 << 20, answer_bytes=64 << 20, cpu_seconds=1)

_QUOTED = re.compile(r'#[^\r\n]*|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]', re.DOTALL)
"""Comments, literals and character classes."""
_SPECIAL = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\([\[\]])|\\.|([&~\n])", re.DOTALL)
"""In those, the escapes to rewrite and the characters with another meaning in Lark, such as "&&" in a class."""


class GbnfError(Exception):
    """The grammar cannot be used."""


class GbnfWorker:
    """Translates grammars in a few sandbox processes."""

    def __init__(self) -> None:
        self._processes = SandboxPool("exo.chat.grammar.gbnf", _LIMITS)

    async def lark(self, source: str) -> str:
        """The grammar in Lark. Raises ``GbnfError`` and ``SandboxBusyError``."""
        try:
            answer = await self._processes.ask({"source": source})
        except SandboxError as error:
            raise GbnfError(f"reading it {error}") from None
        if "error" in answer:
            raise GbnfError(answer["error"])
        return answer["lark"]

    async def aclose(self) -> None:
        """Ends the processes, which have nothing to lose."""
        await self._processes.aclose()


def converted(line: bytes) -> dict[str, str]:
    """Answers one request."""
    try:
        return {"lark": gbnf_to_lark(_QUOTED.sub(_readable, json.loads(line)["source"]))}
    except Exception as error:  # noqa: BLE001, the translator raises it, and its own mistakes raise others
        return {"error": f"it is not GBNF: {error}"[:300]}


def _readable(quoted: re.Match[str]) -> str:
    """A comment unchanged; a literal or a character class with escapes that mean the same in Lark."""
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
    serve(lambda _: converted, _LIMITS)
