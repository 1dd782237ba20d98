"""Compiles a grammar in a sandbox before the runner compiles it: compiling can take unlimited time or memory.

The program's setup is the model's control tokens (``texts`` by id, ``n_vocab``, ``ends``). A request has a ``grammar``;
the answer's ``error`` says why it is invalid.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from exo.worker.runner_common.sandbox import Sandbox, SandboxError, SandboxLimits, serve

LIMITS = LLParserLimits(max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False)
"""Limits of a grammar, in the runner too: 15 ms a token and 100 MB. Limits not named here are llguidance's own."""
_SANDBOX = SandboxLimits(seconds=10, address_space=1 << 30, cpu_seconds=0.8)


class GuidanceVocabulary:
    """The attributes that llguidance's wrapper reads from a tokenizer.

    ``tokens`` are bytes by id; control tokens are ``special``.
    """

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], eos: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos
        self.built: LLTokenizer | None = None

    def __call__(self, text: bytes) -> list[int]:
        """Called only for a grammar that undoes "no_forcing"."""
        return [] if self.built is None else self.built.greedy_tokenize(text.decode())

    def build(self, ends: Sequence[int]) -> LLTokenizer:
        """The tokenizer, in which ``ends`` end generation. Holds the interpreter for a second for 262,144 tokens."""
        self.built = LLTokenizer(TokenizerWrapper(self), n_vocab=len(self.tokens), eos_token=list(ends))
        return self.built


@final
class GrammarSandbox:
    """Compiles grammars for one model. For one thread."""

    def __init__(self, special: Mapping[int, bytes], n_vocab: int, ends: Sequence[int]) -> None:
        """``special`` are the texts of the control tokens."""
        texts = {token: text.decode(errors="replace") for token, text in special.items()}
        setup = {"texts": texts, "n_vocab": n_vocab, "ends": ends}
        self._sandbox = Sandbox("exo.worker.runner_common.grammar.grammar_sandbox", _SANDBOX, setup)

    def run(self, grammar: str) -> str:
        """Returns the error of a grammar for llguidance, or "" if it compiles. Takes about a second."""
        try:
            return self._sandbox.ask({"grammar": grammar})["error"]
        except SandboxError:
            return "it takes too long, or too much memory, to compile"

    def close(self) -> None:
        """Ends the program."""
        self._sandbox.close()


def tokenizer_of(texts: Mapping[str, str], n_vocab: int, ends: Sequence[int]) -> LLTokenizer:
    """A tokenizer with these control tokens. Its ordinary tokens are single bytes, numbered from ``n_vocab``."""
    tokens = [b""] * n_vocab + [bytes([byte]) for byte in range(255)]
    for token, text in texts.items():
        tokens[int(token)] = text.encode()
    return GuidanceVocabulary(tokens, [int(token) for token in texts], ends[0]).build(ends)


def _prepare(setup: bytes) -> Callable[[bytes], Mapping[str, str]]:
    tokenizer = tokenizer_of(**json.loads(setup))

    def compiled(request: bytes) -> dict[str, str]:
        matcher = LLMatcher(tokenizer, json.loads(request)["grammar"], log_level=0, limits=LIMITS)
        if not matcher.is_error() and not matcher.is_stopped():
            matcher.compute_bitmask()
        return {"error": matcher.get_error()}

    return compiled


if __name__ == "__main__":
    serve(_prepare, _SANDBOX)
